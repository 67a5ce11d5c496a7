"""Selecting and repeating sequences of a live cache: each goes on as if it had been read alone."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

import hf_gdn
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER
from tests import tiny_models as tiny

CHANGES = {
    "batch_select_indices": (torch.tensor([2, 0, 2]), [2, 0, 2]),
    "batch_select_mask": (torch.tensor([False, True, True]), [1, 2]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    "reorder_cache": (torch.tensor([1, 1, 0]), [1, 1, 0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_go_on_alone(family, change):
    """The original has only reorder_cache."""
    model, (argument, rows) = tiny.model(family), CHANGES[change]
    method = change.replace("_mask", "_indices")
    ids, _ = tiny.batch(3, 30)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        wanted = model(ids[rows], use_cache=False).logits[:, 20:]
        model(ids[:, :20], **tiny.given(cache))
        if method != "reorder_cache":
            with pytest.raises(AttributeError, match=method):
                getattr(cache, method)(argument)
            cache = DynamicCache(config=model.config)
        with hf_gdn.patched(strict=True):
            if cache.get_seq_length() == 0:
                model(ids[:, :20], **tiny.given(cache))
            getattr(cache, method)(argument)
            got = [model(ids[rows, n : n + 1], **tiny.given(cache)).logits for n in range(20, 24)]
            got.append(model(ids[rows, 24:], **tiny.given(cache)).logits)
    assert_close("logits", torch.cat(got, 1), wanted, LAYER)


def test_layers_that_hold_keys_as_well():
    """They find transformers' own method behind ours."""
    layer = LinearAttentionAndFullAttentionLayer()
    layer.update(torch.arange(3.0).view(3, 1, 1, 1), torch.zeros(3, 1, 1, 1))
    layer.update_conv_state(torch.arange(3.0).view(3, 1, 1))
    with hf_gdn.patched():
        layer.batch_select_indices(torch.tensor([2, 0]))
        layer.batch_repeat_interleave(2)
    assert layer.keys.flatten().tolist() == layer.conv_states[0].flatten().tolist() == [2, 2, 0, 0]


def test_indices_out_of_range_change_nothing(family):
    model = tiny.model(family)
    ids, _ = tiny.batch(3, 10)
    cache = DynamicCache(config=model.config)
    with hf_gdn.patched(), torch.no_grad():
        model(ids, **tiny.given(cache))
        states = cache.layers[0]
        before = states.conv_states[0], states.recurrent_states[0]
        with pytest.raises(IndexError):
            cache.batch_select_indices(torch.tensor([0, 3]))
        assert (states.conv_states[0], states.recurrent_states[0]) == before
        empty = StaticCache(config=model.config, max_cache_len=16)
        empty.layers[0].batch_repeat_interleave(2)  # holds nothing yet


def test_beams_on_every_family(family):
    model = tiny.model(family)
    ids, mask = tiny.batch(2, 12)
    kwargs = dict(attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
    wanted = model.generate(ids, **kwargs)
    with hf_gdn.patched(strict=True):
        assert torch.equal(model.generate(ids, **kwargs), wanted)
