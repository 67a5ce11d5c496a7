"""Prologue and gated norm in Triton's interpreter, against the float64 oracle. Run with TRITON_INTERPRET=1.

Bounds on the relative error: a value is rounded once to the dtype on its way out (2^-9 in bf16, 2^-12 in fp16, at
most), z and the norm's weight before that where the family does so; the operator's bars leave four times that and more.
In fp32 some thirty roundings of 2^-24 each, those of 8 taps, a sum of squares and two exponentials, make 2e-6.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hf_gdn.kernels import GATED_NORM, PROLOGUE_GDN, PROLOGUE_KDA, STEP_KDA, reference
from hf_gdn.kernels.triton import gated_norm as norm_module
from hf_gdn.kernels.triton import prologue as module
from hf_gdn.kernels.triton.runtime import INTERPRET, NOT_MEASURED
from tests.tiny import assert_close

from .steps import FAMILIES, double

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

BUDGET = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
NAMES = ("q", "k", "v", "g", "beta", "conv_state")
SHAPES = {  # B, T, HK, HV, K, V, width
    "one_token": (2, 1, 2, 4, 16, 16, 4),
    "fewer_than_the_window": (1, 2, 1, 2, 16, 8, 4),
    "a_tile": (1, 64, 1, 1, 8, 8, 4),
    "a_token_more": (2, 65, 1, 2, 8, 16, 4),
    "odd_dims": (1, 70, 2, 4, 24, 40, 4),
    "olmo_dims": (1, 5, 1, 1, 96, 192, 4),
    "widest": (1, 33, 1, 1, 256, 256, 4),
    "smallest_dims": (1, 3, 1, 3, 1, 1, 2),
    "no_convolution": (1, 5, 1, 2, 8, 8, 1),
    "width_3": (2, 9, 1, 2, 8, 8, 3),
    "width_8": (1, 66, 1, 2, 8, 8, 8),
}


def make(family, shape, **kwargs):
    op, spec = FAMILIES[family]
    B, T, HK, HV, K, V, width = SHAPES.get(shape, shape)
    if op is STEP_KDA:
        HK = HV
    op = PROLOGUE_KDA if op is STEP_KDA else PROLOGUE_GDN
    return op.make_inputs(B=B, T=T, HK=HK, HV=HV, K=K, V=V, width=width, **{**spec, **kwargs})


def check(projected, weights, spec, **kwargs):
    """Run the kernel, compare with the oracle, return what it made."""
    exact = {n: x.double() if n == "conv_state" and x is not None else x for n, x in kwargs.items()}
    wanted = reference.prologue(double(projected), double(weights), spec, **exact)
    made = module.prologue(projected, weights, spec, **kwargs)
    for name, got, want in zip(NAMES, made, wanted, strict=True):
        if want is None:
            assert got is None
            continue
        assert got.dtype == (torch.float32 if name in ("g", "beta") else projected.q.dtype) and got.is_contiguous()
        if name == "conv_state":
            assert torch.equal(got.double(), want), "the conv_state holds other tokens"
        else:
            assert_close(name, got, want, BUDGET[projected.q.dtype])
    return made


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_shapes(family, shape):
    check(**make(family, shape))


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_dtypes(family, dtype):
    check(**make(family, "width_3", dtype=dtype, bias=True))


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_without_a_cache_or_with_an_empty_one(family):
    inputs = make(family, "a_token_more")
    check(**{**inputs, "conv_state": None, "keep": 0})
    check(**{**inputs, "conv_state": None})


def test_a_window_wider_than_the_convolution():
    """A static cache may keep more columns than there are taps before a token."""
    inputs = make("qwen3_next", "width_3")
    check(**{**inputs, "conv_state": torch.randn(*inputs["conv_state"].shape[:2], 7), "keep": 7})


@pytest.mark.parametrize("shift", [-60.0, -18.0, 25.0, 80.0])
@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear", "glm5_next"])
def test_extreme_gates(family, shift):
    inputs = make(family, "fewer_than_the_window")
    projected, weights = (
        inputs["projected"],
        inputs["weights"]._replace(A_log=torch.zeros_like(inputs["weights"].A_log)),
    )
    check(
        **{
            **inputs,
            "projected": projected._replace(a=projected.a + shift, b=projected.b + shift / 10),
            "weights": weights,
        }
    )


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
@pytest.mark.parametrize("lengths", [(66, 1), (64, 65), (0, 3)], ids=str)
def test_padding_behind_the_rows(family, lengths):
    inputs = make(family, (2, 66, 1, 2, 8, 8, 4))
    check(**inputs, lengths=torch.tensor(lengths))
    check(**{**inputs, "conv_state": None}, lengths=torch.tensor(lengths))


BOUNDS = ([0, 0, 1, 1, 65, 66, 130], [0, 64, 128], [0, 3, 5, 6, 70, 70])


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_packed_is_separate_to_the_bit(family, bounds, index):
    inputs = make(family, (1, bounds[-1], 1, 2, 8, 8, 4))
    projected, weights, spec = inputs["projected"], inputs["weights"], inputs["spec"]
    packed = check(**inputs, cu_seqlens=torch.tensor(bounds, dtype=index))
    for first, last in pairwise(bounds):
        if first == last:
            continue
        part = type(projected)(*(x if x is None else x[:, first:last] for x in projected))
        for name, got, want in zip(NAMES, packed, module.prologue(part, weights, spec)):
            if name != "conv_state":
                assert torch.equal(got[:, first:last], want), f"{name} of tokens {first} to {last}"


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 64, 69])
def test_split_anywhere_is_the_whole_to_the_bit(family, at):
    inputs = make(family, (2, 70, 1, 2, 8, 8, 4), dtype=torch.bfloat16)
    projected, weights, spec = inputs["projected"], inputs["weights"], inputs["spec"]
    whole = module.prologue(projected, weights, spec, conv_state=inputs["conv_state"], keep=4)
    parts, conv_state = [], inputs["conv_state"]
    for part in (slice(0, at), slice(at, None)):
        piece = type(projected)(*(x if x is None else x[:, part] for x in projected))
        *tensors, conv_state = module.prologue(piece, weights, spec, conv_state=conv_state, keep=4)
        parts.append(tensors)
    for name, one, other, want in zip(NAMES, *parts, whole):
        assert torch.equal(torch.cat([one, other], 1), want), name
    assert torch.equal(conv_state, whole.conv_state)


def test_bits_do_not_depend_on_the_tile(monkeypatch):
    inputs = make("qwen3_next", "a_token_more")
    results = []
    for BT, num_warps in [(64, 4), (32, 4), (16, 2)]:
        config = module.PrologueConfig(max_dim=256, BT=BT, num_warps=num_warps, measured_on=NOT_MEASURED)
        monkeypatch.setattr(module, "PROLOGUE_CONFIGS", (config,))
        results.append(check(**inputs))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


def test_separate_projections_and_strided_windows():
    """Layouts with tensors of their own instead of one interleaved, and a conv_state that is a view."""
    inputs = make("qwen3_next", "odd_dims")
    apart = type(inputs["projected"])(
        *(None if x is None else x.clone(memory_format=torch.contiguous_format) for x in inputs["projected"])
    )
    conv_state = inputs["conv_state"].transpose(1, 2).contiguous().transpose(1, 2)
    for x, y in zip(check(**inputs), check(**{**inputs, "projected": apart, "conv_state": conv_state})):
        assert torch.equal(x, y)


def test_what_is_given_stays():
    inputs = make("kimi_linear", "a_token_more")
    tensors = [x for x in (*inputs["projected"], *inputs["weights"], inputs["conv_state"]) if x is not None]
    before = [x.clone() for x in tensors]
    module.prologue(**inputs)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before))


def test_the_host_is_never_asked(monkeypatch):
    inputs = make("qwen3_next", (1, 70, 1, 1, 8, 8, 4))

    def refuse(*args):
        raise AssertionError("reads a tensor's values on the host")

    for name in ("tolist", "item", "__int__", "__index__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    module.prologue(**inputs, cu_seqlens=torch.tensor([0, 1, 70]))


# ----------------------------------------------------------------------------------------------------------------- norm

NORM_SHAPES = {
    "one_row": (1, 1, 1, 1, 16),
    "more_than_a_program": (2, 67, 2, 4, 32),
    "odd_dims": (2, 3, 2, 6, 40),
    "smallest": (1, 2, 1, 3, 1),
    "wide": (1, 9, 1, 2, 192),
    "no_rows": (1, 0, 1, 2, 16),
}
RULES = {name: spec for name, (_, spec) in FAMILIES.items() if name != "bailing_hybrid"}


def make_norm(shape, spec, **kwargs):
    B, T, HK, HV, V = NORM_SHAPES[shape]
    spec = {n: x for n, x in RULES[spec].items() if n in ("gate", "norm_in_fp32", "eps")}
    return GATED_NORM.make_inputs(B=B, T=T, HK=HK, HV=HV, K=8, V=V, **spec, **kwargs)


def check_norm(o, z, weight, spec):
    wanted = reference.gated_norm(o.double(), z.double(), weight.double(), spec)
    y = norm_module.gated_norm(o, z, weight, spec)
    assert y.dtype == o.dtype and y.is_contiguous()
    assert_close("y", y, wanted, BUDGET[o.dtype])
    return y


@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_norm_shapes(shape):
    check_norm(**make_norm(shape, "qwen3_next"))


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("spec", RULES)
def test_norm_rules_and_dtypes(spec, dtype):
    check_norm(**make_norm("odd_dims", spec, dtype=dtype))


def test_norm_rows_are_independent_to_the_bit():
    inputs = make_norm("more_than_a_program", "qwen3_next", dtype=torch.bfloat16)
    whole = check_norm(**inputs)
    for rows in (slice(0, 1), slice(1, 2)):
        part = {**inputs, "o": inputs["o"][rows].contiguous(), "z": inputs["z"][rows]}
        assert torch.equal(check_norm(**part), whole[rows])


def test_norm_rounds_as_plain_pytorch_does(rounded_bf16):
    """In bf16 the eager norm, which keeps the families' roundings, gives the same bits in all but a few places."""
    from hf_gdn.kernels.eager.gated_norm import gated_norm

    for spec in ("qwen3_next", "kimi_linear"):
        inputs = make_norm("more_than_a_program", spec, dtype=torch.bfloat16)
        same = (norm_module.gated_norm(**inputs) == gated_norm(**inputs)).double().mean()
        assert same > 0.98, f"{spec}: {same:.3f} of the numbers are the same"


def test_norm_of_zeros_and_large_numbers():
    inputs = make_norm("odd_dims", "qwen3_next")
    for o in (torch.zeros_like(inputs["o"]), 1e15 * inputs["o"]):
        inputs["o"] = o
        assert torch.isfinite(norm_module.gated_norm(**inputs)).all()
