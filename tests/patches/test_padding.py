"""Padding anywhere: real tokens come out as without it, and the caches end where they would (docs/differences.md).

The oracle is the original layer on each row's real tokens alone. The budget is LAYER.
"""

import pytest
import torch
from transformers import DynamicCache

import hf_gdn
from hf_gdn import patches
from hf_gdn.testing import assert_close, error
from hf_gdn.testing.tolerances import GRADIENT, LAYER
from tests import tiny_models as tiny

# By name a mask [3, 12]; the last row of each is the hard one.
MASKS = {
    "right": ["111111111111", "111111110000", "100000000000"],
    "left": ["111111111111", "000011111111", "000000000001"],
    "holes": ["101101011101", "111000000111", "010000000010"],
    "both_ends": ["001111111100", "011111111110", "000001100000"],
    "nothing": ["111111111111", "111111111110", "000000000000"],
}


def mask_of(name: str) -> torch.Tensor:
    return torch.tensor([[int(token) for token in row] for row in MASKS[name]])


@pytest.fixture
def layer(family):
    return tiny.mixer(tiny.model(family))


@pytest.fixture
def cache(family):
    """Makes a cache of the model's text config."""
    config = tiny.model(family).config.get_text_config()
    return lambda: DynamicCache(config=config)


def alone(layer, cache, x):
    """The original layer on real tokens alone, [1, t, hidden] in one forward: outputs and the cache's layer."""
    kept = cache()
    with torch.no_grad(), hf_gdn.unpatched():
        return layer(x, **tiny.layer_given(layer, kept)), kept.layers[layer.layer_idx]


@pytest.mark.parametrize("name", MASKS)
def test_padding_is_as_if_it_were_not_there(layer, cache, name):
    """A padded prefill, then a padded piece, then a token: outputs and both states of every row."""
    torch.manual_seed(0)
    first, second = torch.randn(3, 12, 32), torch.randn(3, 12, 32)
    last = torch.randn(3, 1, 32)
    mask = mask_of(name)
    later = mask.flip(1)
    kept = cache()
    with torch.no_grad(), hf_gdn.patched(strict=True):
        got = [layer(first, **tiny.layer_given(layer, kept), attention_mask=mask)]
        got += [layer(second, **tiny.layer_given(layer, kept), attention_mask=later)]
        got += [layer(last, **tiny.layer_given(layer, kept))]
    states = kept.layers[layer.layer_idx]
    for row in range(3):
        pieces = [first[row, mask[row] == 1], second[row, later[row] == 1], last[row]]
        wanted, own = alone(layer, cache, torch.cat(pieces)[None])
        real = [got[0][row, mask[row] == 1], got[1][row, later[row] == 1], got[2][row]]
        assert_close(f"row {row}", torch.cat(real), wanted[0], LAYER)
        assert_close("state", states.recurrent_states[0][row], own.recurrent_states[0][0], LAYER)
        assert_close("window", states.conv_states[0][row], own.conv_states[0][0], LAYER)
    assert not got[0][mask == 0].any() and not got[1][later == 0].any()


WHOLE = {
    "left": "0" * 12 + "1" * 48,
    "right": "1" * 48 + "0" * 12,
    "hole": "1" * 30 + "0" * 7 + "1" * 23,
    "holes": "1101110011" * 6,
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_does_not_see_padding(family, name):
    """With positions that count real tokens. What a family cannot do is off by more than rounding, or it could."""
    model, ids = tiny.model(family), tiny.batch(1, 60)[0]
    mask = torch.tensor([[int(token) for token in WHOLE[name]]])
    real, positions = mask[0] == 1, (mask.cumsum(1) - 1).clamp(min=0)

    def off(context):
        with torch.no_grad(), context:
            return error(model(ids, attention_mask=mask, position_ids=positions).logits[:, real], wanted)

    with torch.no_grad(), hf_gdn.patched(strict=True):
        wanted = model(ids[:, real]).logits
    inside = name in ("hole", "holes")
    patched = off(hf_gdn.patched(strict=True))
    if inside and "padding inside a row" in dict(patches.all_families()[family].cannot):
        assert 1e-3 < patched < off(hf_gdn.unpatched())
    else:
        assert patched < LAYER


def test_the_original_is_wrong_behind_right_padding(layer, cache):
    """What docs/differences.md says of it: padding goes on decaying the state and enters the window."""
    torch.manual_seed(0)
    x, mask = torch.randn(1, 40, 32), torch.ones(1, 40)
    mask[:, 8:] = 0
    _, own = alone(layer, cache, x[:, :8])
    off = {}
    for name, context in (("original", hf_gdn.unpatched), ("patched", hf_gdn.patched)):
        kept = cache()
        with torch.no_grad(), context():
            layer(x, **tiny.layer_given(layer, kept), attention_mask=mask)
        states = kept.layers[layer.layer_idx]
        off[name] = [
            error(mine, theirs)
            for mine, theirs in (
                (states.recurrent_states[0], own.recurrent_states[0]), (states.conv_states[0], own.conv_states[0])
            )
        ]  # fmt: skip
    assert max(off["patched"]) < LAYER and min(off["original"]) > 0.1


def test_gradients_do_not_see_padding(layer):
    """Those of parameters and inputs are the unpadded row's."""
    torch.manual_seed(0)
    x = torch.randn(1, 9, 32)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0, 1]])

    def gradients(run, x):
        layer.zero_grad()
        x = x.clone().requires_grad_()
        run(x).square().sum().backward()
        return x.grad, [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    wanted_x, wanted = gradients(lambda x: layer(x), x[:, mask[0] == 1])
    with hf_gdn.patched(strict=True):
        got_x, got = gradients(lambda x: layer(x, attention_mask=mask), x)
    assert_close("x", got_x[:, mask[0] == 1], wanted_x, GRADIENT)
    assert not got_x[:, mask[0] == 0].any()
    for a, b in zip(got, wanted):
        assert (a - b).norm() <= GRADIENT * b.norm() + 1e-7


def test_nan_in_padding_stays_there(layer):
    x, mask = torch.randn(2, 10, 32), torch.ones(2, 10)
    mask[1, 7:] = 0
    wanted = layer(x)
    x[1, 7:] = torch.nan
    with torch.no_grad(), hf_gdn.patched():
        got = layer(x, attention_mask=mask)
    assert torch.isfinite(got).all()
    assert_close("row", got[1, :7], wanted[1, :7], LAYER)


def test_right_padded_batches_of_a_model(family):
    """Logits of real tokens equal those of each row alone, through the whole model."""
    ids, _ = tiny.batch(rows=3, length=20)
    lengths = (20, 13, 4)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    model = tiny.model(family)
    ids = torch.randint(3, 128, ids.shape, generator=torch.Generator().manual_seed(0)) * mask
    with torch.no_grad():
        wanted = [model(ids[row : row + 1, :length]).logits[0] for row, length in enumerate(lengths)]
        with hf_gdn.patched(strict=True):
            got = model(ids, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        assert_close(f"row {row}", got[row, :length], wanted[row], LAYER)


def test_a_mask_of_another_shape(layer):
    with hf_gdn.patched(), pytest.raises(ValueError, match=r"attention_mask must be \[B, T\] = \[2, 5\], got \[2, 6\]"):
        layer(torch.randn(2, 5, 32), attention_mask=torch.ones(2, 6))
