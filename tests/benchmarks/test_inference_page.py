"""The page about inference is what its result files say."""

from benchmarks.inference_page import PAGE, read, render


def test_the_page_is_written_from_the_results():
    assert PAGE.read_text() == render(read("mapped_table"), read("inference_passes"), read("rounded_rows"))


def test_rows_of_int8_cost_little_and_take_half_the_bytes():
    rows = read("rounded_rows")["rows"]
    assert rows["int8"]["cost_percent"] <= 0.5
    assert rows["int8"]["rows_bytes"] <= 0.53 * rows["bfloat16"]["rows_bytes"]  # a scale of 4 bytes for 96 columns
