"""The recurrent Triton kernel on a GPU, at the shapes and dtypes of real layers.

Budgets as in `test_recurrent_interpreted`: 1e-5 in fp32, where the card's exp and rsqrt add an error of 2^-22 per step,
and the operator's bars of 1e-3 in fp16 and 1.6e-2 in bf16, which one rounding of o stays below.
"""

import pytest
import torch

from hf_gdn.kernels import RECURRENT_GDN, RECURRENT_KDA
from hf_gdn.kernels.triton import tokens as tiles
from hf_gdn.kernels.triton.recurrent import recurrent

from .test_recurrent_interpreted import BUDGET, assert_same, check, make, tokens

pytestmark = pytest.mark.gpu

SHAPES = {  # T, HK, HV, K, V
    "qwen3_next": (16, 32, 128, 128),
    "equal_heads": (32, 32, 128, 128),
    "olmo_hybrid": (30, 30, 96, 192),
    "largest": (2, 4, 256, 256),
}


@pytest.fixture(params=[RECURRENT_GDN, RECURRENT_KDA], ids=["gdn", "kda"])
def op(request):
    return request.param


def cuda_inputs(op, shape, B, T, dtype=torch.bfloat16, **kwargs):
    return make(op, (B, T, *SHAPES[shape]), dtype, device="cuda", **kwargs)


@pytest.mark.parametrize("T", [1, 4, 16])
@pytest.mark.parametrize("B", [1, 8, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(op, shape, B, T):
    check({**cuda_inputs(op, shape, B, T), "qk_l2norm": True})


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("T", [1, 4, 1000])
def test_dtypes(op, dtype, T):
    check(cuda_inputs(op, "qwen3_next", 2, T, dtype))
    check(cuda_inputs(op, "qwen3_next", 2, T, dtype, state=False))


@pytest.mark.parametrize("decay", [0.0, 60.0, 1e4], ids=str)
def test_extreme_gates(op, decay):
    check(cuda_inputs(op, "qwen3_next", 1, 16, decay=decay))


def test_bits_do_not_depend_on_batch_or_split(op):
    inputs = {**cuda_inputs(op, "qwen3_next", 160, 4), "qk_l2norm": True}
    whole = recurrent(**inputs)
    assert_same(recurrent(**inputs), whole)
    used = {tiles.tile_config(B * 32, 128, 128) for B in (1, 32, 160)}
    assert len(used) == len(tiles.TOKEN_CONFIGS), "the batches below no longer reach every tile"
    for B in (1, 32):
        few = {name: x[:B] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        assert_same(recurrent(**few), [x[:B] for x in whole])
    state, parts = inputs["initial_state"].clone(), []
    for t in range(4):
        part = {**tokens(inputs, slice(t, t + 1)), "initial_state": state}
        parts.append(recurrent(**part, inplace=True)[0])
    assert_same((torch.cat(parts, 1), state), whole)


def test_state_after_every_token(op):
    inputs = cuda_inputs(op, "qwen3_next", 2, 4)
    states = torch.full((2, 4, 32, 128, 128), torch.nan, device="cuda")
    recurrent(**inputs, token_states=states)
    for t in range(4):
        assert torch.equal(states[:, t], recurrent(**tokens(inputs, slice(t + 1)))[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_is_separate(op, dtype):
    bounds = [0, 5, 5, 6, 70]
    inputs = cuda_inputs(op, "qwen3_next", 1, 70)
    inputs["initial_state"] = torch.randn(4, 32, 128, 128, device="cuda")
    o, final = check({**inputs, "cu_seqlens": torch.tensor(bounds, dtype=dtype, device="cuda")})
    for n in range(4):
        part = slice(bounds[n], bounds[n + 1])
        alone = {**tokens(inputs, part), "initial_state": inputs["initial_state"][n : n + 1]}
        assert_same(recurrent(**alone), (o[:, part], final[n : n + 1]))


def test_more_heads_than_a_grid_axis_holds(op):
    # 70,000 heads; grid y and z end at 65,535.
    check(make(op, (70_000, 1, 1, 1, 8, 8), torch.bfloat16, device="cuda"))


def test_another_device(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = make(op, (1, 2, *SHAPES["qwen3_next"]), torch.bfloat16, device="cuda:1")
    o, _ = check(inputs)
    assert o.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
