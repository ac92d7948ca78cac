"""Decoding in place, into a cache with room, equals decoding with a cache that grows."""

import pytest
import torch

from ultramem.graph.static_cache import StaticCache

ROOM = 16


def with_room(cache):
    """What is not in use is NaN: it must not be looked at."""

    def made(tensors):
        buffers = [each.new_full((*each.shape[:2], ROOM, each.shape[3]), torch.nan) for each in tensors]
        for buffer, each in zip(buffers, tensors, strict=True):
            buffer[:, :, : each.shape[2]] = each
        return tuple(buffers)

    return made(cache.keys), made(cache.values), cache.convs


@pytest.mark.parametrize("looked_at", ["those in use", "all"])
def test_steps_in_place_equal_steps_with_a_longer_cache(model, looked_at):
    """Rows of different lengths; a graph of one shape looks at all columns, those that are not in use masked."""
    model.double()
    tokens = torch.randint(0, 61, (3, 12))
    mask = torch.ones(3, ROOM, dtype=torch.int64)
    mask[1, :2] = 0
    mask[2, 9] = 0  # a new token may be padding as well
    with torch.no_grad():
        output = model(tokens[:, :5], attention_mask=mask[:, :5])
        keys, values, convs = with_room(output.cache)
        if looked_at == "all":
            keys, values = (tuple(each.nan_to_num() for each in buffers) for buffers in (keys, values))
        buffers = [each.data_ptr() for each in (*keys, *values)]
        for column in range(5, 12):
            step, seen = tokens[:, column : column + 1], mask[:, : column + 1]
            positions = (seen.sum(1, keepdim=True) - 1).clamp_min(0)
            output = model(step, attention_mask=seen, position_ids=positions, cache=output.cache)
            if looked_at == "all":
                seen = torch.nn.functional.pad(seen, (0, ROOM - column - 1))
            cache = StaticCache(keys, values, convs, torch.tensor([column]), seen.shape[1])
            logits, convs = model.decode_in_place(step, seen, positions, cache)
            torch.testing.assert_close(logits, output.logits, rtol=0, atol=1e-12)
            for ours, theirs in zip(
                (*convs, *keys, *values), (*output.cache.convs, *output.cache.keys, *output.cache.values), strict=True
            ):
                used = ours[:, :, : theirs.shape[2]]
                torch.testing.assert_close(used, theirs, rtol=0, atol=1e-12)
    assert [each.data_ptr() for each in (*keys, *values)] == buffers
