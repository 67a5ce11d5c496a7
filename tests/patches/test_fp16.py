"""fp16 stays finite where gates are extreme or inputs long, and near the fp32 layer."""

import copy

import pytest
import torch
from transformers import DynamicCache

import hf_gdn
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import HALF_LAYER
from tests import tiny_models as tiny


def extreme(layer, A_log: float) -> None:
    """Set every decay parameter of a layer to `A_log`."""
    [parameter] = [p for name, p in layer.named_parameters() if name.endswith("A_log")]
    torch.nn.init.constant_(parameter, A_log)


def run(layer, x, cache=None):
    with torch.no_grad():
        return layer(x, **tiny.layer_given(layer, cache))


@pytest.mark.parametrize("A_log", [-20.0, 0.0, 11.0])
def test_extreme_decays(family, A_log):
    """exp(A_log) from 2e-9, which keeps all, over 1 to 6e4, which keeps nothing."""
    model = tiny.model(family)
    full = tiny.mixer(model)
    extreme(full, A_log)
    half = copy.deepcopy(full).half()
    full = copy.deepcopy(half).float()
    x = torch.randn(2, 200, 32, generator=torch.Generator().manual_seed(0)).half()
    wanted = run(full, x.float())
    with hf_gdn.patched(strict=True):
        assert_close("prefill", run(half, x).float(), wanted, HALF_LAYER)
        cache = DynamicCache(config=model.config)
        pieces = [run(half, x[:, a:b], cache) for a, b in ((0, 130), (130, 131), (131, 140), (140, 200))]
        assert_close("in pieces", torch.cat(pieces, 1).float(), wanted, HALF_LAYER)
        large = run(half, x * 200)  # hidden states up to 800, whose products with weights come near fp16's end
    assert torch.isfinite(large).all()


@pytest.mark.parametrize("A_log", [-20.0, 1.0])
@pytest.mark.parametrize("rule", ["qwen3_next", "kimi_linear"])
def test_a_hundred_thousand_tokens(rule, A_log):
    """With and without forgetting; the last tokens agree with the same layer in fp32, which sums as long."""
    model = tiny.model(rule)
    half = tiny.mixer(model).half()
    extreme(half, A_log)
    full = copy.deepcopy(half).float()
    x = torch.randn(1, 100_000, 32, generator=torch.Generator().manual_seed(0)).half()
    cache = DynamicCache(config=model.config)
    with hf_gdn.patched(rule, strict=True):
        got, wanted = run(half, x, cache), run(full, x.float())
    assert torch.isfinite(got).all() and torch.isfinite(cache.layers[0].recurrent_states[0]).all()
    assert_close("the last thousand", got[:, -1000:].float(), wanted[:, -1000:], HALF_LAYER)


@pytest.mark.parametrize("seed, jumps", [(2, "patched"), (25, "original"), (5, "both")])
@pytest.mark.extended
def test_tokens_of_bailing_hybrid_jump_where_a_router_ties(seed, jumps):
    """Single tokens are percents off in fp16. In each of them, or before it, an expert differs from fp32's choice."""
    if "bailing_hybrid" not in tiny.CONFIGS:
        pytest.skip("the installed transformers has no bailing_hybrid")
    half = tiny.model("bailing_hybrid", seed, torch.float16)
    exact = tiny.model("bailing_hybrid", seed)
    exact.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    ids, chosen = tiny.batch(1, 70, seed)[0], []
    for model in (exact, half):
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(
                    lambda _, args, out: chosen.append(next(x for x in out if not x.is_floating_point()))
                )

    def run(model):
        chosen.clear()
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0].float()
        return logits, torch.stack([experts.view(70, -1).sort(-1)[0] for experts in chosen])

    wanted, experts = run(exact)
    for name, context in (("patched", hf_gdn.patched), ("original", hf_gdn.unpatched)):
        with context():
            logits, others = run(half)
        off = (logits - wanted).norm(dim=1) / wanted.norm(dim=1)
        flipped = (experts != others).any(-1).any(0)
        if jumps in (name, "both"):
            first = int(flipped.nonzero()[0])
            assert off.max() > 1e-2 and off[:first].max() < off.max() / 5
            assert flipped[off.argmax()] or off.argmax() > first
        else:
            assert not flipped.any() and off.max() < 5e-3
