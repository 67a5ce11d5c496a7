"""Prologue and gated norm on a GPU, at the shapes and dtypes of real layers, against their plain PyTorch in float64.

That is held against the loop in tests/kernels/test_eager_layer.py. Budgets as in `test_prologue_interpreted`.
"""

import pytest
import torch

from hf_gdn.kernels import GATED_NORM
from hf_gdn.kernels.eager import gated_norm as eager_norm
from hf_gdn.kernels.eager import prologue as eager_prologue
from hf_gdn.kernels.triton import gated_norm as norm_module
from hf_gdn.kernels.triton import prologue as module
from tests.tiny import assert_close

from .steps import FAMILIES, double
from .test_prologue_interpreted import BUDGET, NAMES, make

pytestmark = pytest.mark.gpu

DIMS = {  # HK, HV, K, V
    "qwen3_next": (16, 32, 128, 128),
    "olmo_hybrid": (30, 30, 96, 192),
    "kimi_linear": (32, 32, 128, 128),
}


def inputs(family, B, T, width=4, dtype=torch.bfloat16, **kwargs):
    return make(family, (B, T, *DIMS.get(family, DIMS["kimi_linear"]), width), dtype=dtype, device="cuda", **kwargs)


def check(call):
    exact = dict(call, projected=double(call["projected"]), weights=double(call["weights"]))
    exact["conv_state"] = None if call["conv_state"] is None else call["conv_state"].double()
    made = module.prologue(**call)
    for name, got, want in zip(NAMES, made, eager_prologue.prologue(**exact), strict=True):
        assert_close(name, got, want, BUDGET[call["projected"].q.dtype])
    return made


@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 17), (2, 63), (1, 64), (1, 1000), (8, 512)])
@pytest.mark.parametrize("family", DIMS)
def test_shapes(family, B, T):
    check(inputs(family, B, T))


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_dtypes(family, dtype):
    check(inputs(family, 2, 70, dtype=dtype, bias=True))


@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_widths(width):
    check(inputs("qwen3_next", 2, 70, width))


@pytest.mark.parametrize("family", DIMS)
def test_padded_and_packed(family):
    check(dict(inputs(family, 2, 200), lengths=torch.tensor([200, 3], device="cuda")))
    bounds = torch.tensor([0, 0, 1, 65, 66, 200], device="cuda")
    check(dict(inputs(family, 1, 200), conv_state=None, cu_seqlens=bounds))


@pytest.mark.parametrize("family", DIMS)
def test_bits_do_not_depend_on_batch_or_run(family):
    call = inputs(family, 9, 300)
    whole = module.prologue(**call)
    assert all(torch.equal(x, y) for x, y in zip(module.prologue(**call), whole))
    projected = type(call["projected"])(*(x if x is None else x[4:5] for x in call["projected"]))
    one = module.prologue(**dict(call, projected=projected, conv_state=call["conv_state"][4:5]))
    assert all(torch.equal(x, y[4:5]) for x, y in zip(one, whole))


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("family", DIMS)
def test_norm(family, dtype):
    _, spec = FAMILIES[family]
    HK, HV, K, V = DIMS[family]
    call = GATED_NORM.make_inputs(B=3, T=100, HK=HK, HV=HV, K=K, V=V, dtype=dtype, device="cuda", **spec)
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    assert_close("y", norm_module.gated_norm(**call), eager_norm.gated_norm(**exact), BUDGET[dtype])
