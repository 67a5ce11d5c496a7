"""The oracle against a case computed by hand and against transformers' own functions."""

import inspect

import pytest
import torch
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from hf_gdn import registry
from hf_gdn.kernels.reference import delta_rule
from hf_gdn.testing import assert_close, assert_same
from hf_gdn.testing.calls import tokens
from hf_gdn.testing.tolerances import DELTA_RULE


def test_two_tokens_by_hand():
    # One head, K = 2, V = 1. Token 1 writes 3 * 1/2 under key (1, 0); token 2 halves that, reads 0.75 under the same
    # key, wants 1, writes the whole difference: state (1, 0).
    q = torch.tensor([[1.0, 0.0], [2.0, 5.0]]).view(1, 2, 1, 2)
    k = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(1, 2, 1, 2)
    v = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1)
    g = torch.tensor([0.0, 0.5]).log().clamp(min=-1e9).view(1, 2, 1)
    beta = torch.tensor([0.5, 1.0]).view(1, 2, 1)
    o, state = delta_rule(q, k, v, g, beta, scale=10.0)
    assert o.flatten().tolist() == pytest.approx([15.0, 20.0])
    assert state.flatten().tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize(
    ("op", "function", "heads"),
    [
        ("chunk_gdn", qwen.torch_chunk_gated_delta_rule, 2),
        ("recurrent_gdn", qwen.torch_recurrent_gated_delta_rule, 2),
        ("chunk_kda", kimi.chunk_kimi_delta_attention, 4),
        ("recurrent_kda", kimi.recurrent_kimi_delta_attention, 4),
    ],
)
def test_agrees_with_transformers(op, function, heads):
    inputs = registry.ops()[op].make_inputs(B=2, T=70, HK=heads, HV=4, K=8, V=8, dtype=torch.float32)
    inputs["qk_l2norm"] = True
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    function = inspect.unwrap(function)
    if "repeat_interleave" not in function.__code__.co_names:  # transformers 5.17 leaves it to the layer
        q, k = (x.repeat_interleave(4 // heads, dim=2) for x in (q, k))
    theirs = function(
        q, k, v, g=inputs["g"], beta=inputs["beta"], initial_state=inputs["initial_state"], output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    ours = delta_rule(**inputs)
    for name, got, wanted in zip(("o", "state"), ours, theirs):
        assert_close(name, got, wanted, DELTA_RULE[torch.float32])


def test_packed_is_separate():
    inputs = registry.ops()["chunk_kda"].make_inputs(T=10, HK=1, HV=2, K=4, V=3, dtype=torch.float64, state=False)
    o, state = delta_rule(**{**inputs, "cu_seqlens": torch.tensor([0, 0, 1, 10])})
    alone, final = delta_rule(**tokens("chunk_kda", inputs, slice(1, None)))
    assert_same("o", o[:, 1:], alone)
    assert_same("state", state[2:], final)
    assert state[0].abs().max() == 0
