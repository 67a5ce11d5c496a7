"""The recurrent Triton kernel compiled for cards that need not be there: no spills, shared memory within the limit."""

import pytest

from hf_gdn.kernels.triton.runtime import HAS_TRITON, INTERPRET

if INTERPRET or not HAS_TRITON:
    pytest.skip("needs Triton's compiler: the package, and no TRITON_INTERPRET", allow_module_level=True)

import triton

from hf_gdn.kernels.triton import recurrent as module
from hf_gdn.kernels.triton.tokens import FP_FUSION, TOKEN_CONFIGS, tile_config

from .compiled import TARGETS, Compiled, check, compile_for

ROWS = [config.max_heads for config in TOKEN_CONFIGS]
GATES = pytest.mark.parametrize("is_kda", [False, True], ids=["gdn", "kda"])


def compiled(target, is_kda, K=128, V=128, heads=ROWS[-1], given=("p_initial",), one_token=False) -> Compiled:
    """The kernel as launched on bf16 tensors, `heads` = N * HV, with l2norm; `given` are the optional tensors."""
    kernel = module._recurrent_kernel
    BV, num_warps = tile_config(heads, K, V)
    optional = {"p_initial": "*fp32", "p_tokens": "*fp32", "p_bounds": "*i64"}
    strides = [name for name in kernel.arg_names if name.startswith("stride_")]
    signature = dict.fromkeys(("p_q", "p_k", "p_v", "p_beta", "p_o"), "*bf16")
    signature |= dict.fromkeys(("p_g", "p_final"), "*fp32") | {"scale": "fp32", "T": "i32"}
    signature |= dict.fromkeys(strides, "i32") | {name: optional[name] for name in given}
    constexprs = {name: None for name in optional if name not in given}
    constexprs |= {"HK": 16, "HV": 32, "K": K, "V": V, "BK": triton.next_power_of_2(K), "BV": BV}
    constexprs |= {"IS_KDA": is_kda, "QK_L2NORM": True}
    # Triton makes a constant of an integer that is 1.
    ones = ["stride_bh"] + ["stride_gh"] * (not is_kda) + ["T"] * one_token
    for name in ones:
        del signature[name]
        constexprs[name] = 1
    return compile_for(
        kernel, signature, constexprs, target, num_warps,
        divisible=[name for name in strides if name in signature], enable_fp_fusion=FP_FUSION,
    )  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("heads", ROWS)
@GATES
def test_every_row_of_the_table(target, heads, is_kda):
    check(compiled(target, is_kda, heads=heads))


# KDA has more to remember than GDN, and the last row's tile takes most registers.
@pytest.mark.parametrize("target", TARGETS)
def test_one_token(target):
    check(compiled(target, is_kda=True, one_token=True))


@pytest.mark.parametrize("target", TARGETS)
def test_packed_with_token_states(target):
    check(compiled(target, is_kda=True, given=("p_initial", "p_tokens", "p_bounds")))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("K", "V"), [(96, 192), (256, 256)], ids=str)
@GATES
def test_other_dims(target, K, V, is_kda):
    check(compiled(target, is_kda, K, V))
