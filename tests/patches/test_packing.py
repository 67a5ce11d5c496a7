"""Packed sequences: whichever way their bounds are told, each gives what it gives alone."""

from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

import hf_gdn
from hf_gdn.testing import assert_close, error
from hf_gdn.testing.tolerances import GRADIENT, LAYER
from hf_gdn.upstream.modules import checkpointing_enable
from tests import tiny_models as tiny

BOUNDS = [0, 7, 8, 50]


@pytest.fixture
def model(family):
    return tiny.model(family)


def restarting(bounds: list[int]) -> torch.Tensor:
    """position_ids ``[1, T]`` that restart at bounds."""
    return torch.cat([torch.arange(last - first) for first, last in pairwise(bounds)])[None]


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def test_packed_sequences_are_separate(model):
    """cu_seq_lens_q cuts convolution and recurrence of the layer; transformers needs fla for this, or ignores it."""
    layer = tiny.mixer(model)
    x = torch.randn(1, 50, 32)
    with hf_gdn.patched(), torch.no_grad():
        packed = layer(x, cu_seq_lens_q=torch.tensor(BOUNDS, dtype=torch.int32))
        for first, last in pairwise(BOUNDS):
            assert_close(f"{first}:{last}", packed[:, first:last], layer(x[:, first:last]), LAYER)
        with pytest.raises(ValueError, match="never fall"):
            layer(x, cu_seq_lens_q=torch.tensor([0, 9, 8, 50]))
        seq_idx = torch.tensor([[4] * 7 + [2] + [7] * 42], dtype=torch.int32)  # any numbers that change
        for _ in range(2):
            assert torch.equal(layer(x, seq_idx=seq_idx), packed)
        seq_idx[0, 7] = 7
        again = layer(x, seq_idx=seq_idx)
        assert_close("changed in place", again[:, 7:], layer(x[:, 7:]), LAYER)
        with pytest.raises(ValueError, match=r"seq_idx must be \[1, T\] = \[1, 50\] .* got \[50\]"):
            layer(x, seq_idx=seq_idx[0])
        with pytest.raises(ValueError, match=r"cu_seq_lens_q needs hidden states \[1, T, hidden\], got \[2, 25, 32\]"):
            layer(x.view(2, 25, 32), cu_seq_lens_q=torch.tensor(BOUNDS))


def test_gradients_of_packed_sequences_are_separate(model):
    layer = tiny.mixer(model)
    x = torch.randn(1, 30, 32, requires_grad=True)
    with hf_gdn.patched(strict=True):
        packed = layer(x, seq_idx=torch.tensor([[0] * 11 + [1] * 19]))
        (got,) = torch.autograd.grad(packed[:, 11:].square().sum(), x)
        (wanted,) = torch.autograd.grad(layer(x[:, 11:]).square().sum(), x)
    assert not got[:, :11].any()
    assert_close("gradient", got, wanted, GRADIENT)


def test_packed_rows_are_separate(model):
    """Several rows, each packed in its own way."""
    layer, x = tiny.mixer(model), torch.randn(2, 25, 32)
    bounds = [0, 4, 25], [0, 25]
    seq_idx = torch.tensor([[0] * 4 + [1] * 21, [0] * 25])
    with hf_gdn.patched(strict=True), torch.no_grad():
        packed = layer(x, seq_idx=seq_idx)
        for row, cuts in enumerate(bounds):
            for first, last in pairwise(cuts):
                piece = layer(x[row : row + 1, first:last])
                assert_close(f"row {row}, {first}:{last}", packed[row : row + 1, first:last], piece, LAYER)
        same = layer(x, seq_idx=seq_idx[:1])
        assert_close("one row of indices for all", same[1:, 4:], layer(x[1:, 4:]), LAYER)


def test_restarting_positions_cut_every_linear_layer(model):
    ids, _ = tiny.batch(1, 50)
    taken = []
    with hf_gdn.patched(strict=True), torch.no_grad():
        for layer in tiny.mixers(model):
            layer.register_forward_hook(
                lambda layer, args, kwargs, out: taken.append((layer, *args, *kwargs.values(), out)), with_kwargs=True
            )
        model(ids, position_ids=restarting(BOUNDS), use_cache=False)
        seen = [
            (layer, next(x for x in rest if torch.is_tensor(x) and x.ndim == 3), rest[-1]) for layer, *rest in taken
        ]
        assert len(seen) == 3
        for n, (layer, x, out) in enumerate(seen):
            for first, last in pairwise(BOUNDS):
                piece = type(layer).forward(layer, x[:, first:last])
                assert_close(f"layer {n}, {first}:{last}", out[:, first:last], piece, LAYER)


def test_restarting_positions_give_the_logits_of_separate_runs(model, family):
    """The original's linear layers read on across the restart."""
    tiny.skip_what_it_cannot(family, "packed by `position_ids`")
    ids, _ = tiny.batch(1, 50)
    wanted = torch.cat([logits(model, ids[:, first:last]) for first, last in pairwise(BOUNDS)], 1)
    positions = restarting(BOUNDS)
    assert error(logits(model, ids, position_ids=positions), wanted) > 1e-3
    with hf_gdn.patched(strict=True):
        assert_close("packed", logits(model, ids, position_ids=positions), wanted, LAYER)
        rows = logits(
            model, ids.view(2, 25), position_ids=torch.stack([restarting([0, 25])[0], restarting([0, 9, 25])[0]])
        )
        for row, first, last in ((0, 0, 25), (1, 0, 9), (1, 9, 25)):
            alone = logits(model, ids.view(2, 25)[row : row + 1, first:last])
            assert_close(f"row {row}, {first}:{last}", rows[row : row + 1, first:last], alone, LAYER)


def test_training_on_packed_sequences_with_checkpointing(model, family):
    """The recomputed forward of a checkpointed layer is told as well."""
    tiny.skip_what_it_cannot(family, "packed by `position_ids`")
    ids, _ = tiny.batch(1, 50)

    def gradients(pieces):
        model.train()
        model.zero_grad()
        for piece, positions in pieces:
            out = model(piece, position_ids=positions, use_cache=False)
            out.logits.float().square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    alone = gradients([(ids[:, first:last], None) for first, last in pairwise(BOUNDS)])
    checkpointing_enable(model)
    with hf_gdn.patched(strict=True):
        assert_close("gradients", gradients([(ids, restarting(BOUNDS))]), alone, GRADIENT)


def test_positions_that_do_not_say_packed(model):
    """A mask, a past, positions that go on or a single token: nothing is cut, as in transformers' masks."""
    ids, mask = tiny.batch(2, 12)
    ids = ids[:1].repeat(2, 1)
    with hf_gdn.patched(strict=True):
        plain = logits(model, ids)
        shifted = torch.arange(12)[None] + 5
        if not hasattr(model.model, "rotary_emb"):
            assert torch.equal(logits(model, ids, position_ids=shifted), plain)
        padded = (mask.cumsum(1) - 1).clamp(min=0)
        assert_close(
            "a mask", logits(model, ids, attention_mask=mask, position_ids=padded)[0], logits(model, ids[:1])[0], LAYER
        )
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :6], **tiny.given(cache))
            state = cache.layers[0].recurrent_states[0].clone()
            model(ids[:, 6:], **tiny.given(cache), position_ids=torch.arange(6).repeat(2, 1) * 2)
        assert cache.layers[0].recurrent_states[0].shape == state.shape


def test_explicit_bounds_come_first(model):
    ids, _ = tiny.batch(1, 20)
    with hf_gdn.patched(strict=True), torch.no_grad():
        layer, taken = tiny.mixer(model), []
        layer.register_forward_hook(lambda layer, args, kwargs, out: taken.append(kwargs), with_kwargs=True)
        given = torch.zeros(1, 20, dtype=torch.int32)
        model(ids, position_ids=restarting([0, 5, 20]), seq_idx=given, use_cache=False)
        model(ids, position_ids=restarting([0, 5, 20]), cu_seq_lens_q=torch.tensor([0, 20]), use_cache=False)
    assert taken[0]["seq_idx"] is given and taken[1].get("seq_idx") is None
