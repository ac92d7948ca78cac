"""From the raw files of `examples/experiment.py` to numbers, plots and a page."""
