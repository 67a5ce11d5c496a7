"""The step kernels compiled for cards that need not be there: no spills, shared memory within the limit."""

import pytest

from hf_gdn.kernels.triton.runtime import HAS_TRITON, INTERPRET

if INTERPRET or not HAS_TRITON:
    pytest.skip("needs Triton's compiler: the package, and no TRITON_INTERPRET", allow_module_level=True)

import triton

from hf_gdn.kernels.triton import step as module
from hf_gdn.kernels.triton.tokens import FP_FUSION, TOKEN_CONFIGS, tile_config

from .compiled import TARGETS, Compiled, check, compile_for

ROWS = [config.max_heads for config in TOKEN_CONFIGS]
RULES = pytest.mark.parametrize("is_kda", [False, True], ids=["gdn", "kda"])


def compiled(kernel, target, num_warps, constexprs, T=None, bias=False) -> Compiled:
    """A kernel as launched on bf16 tensors and parameters."""
    strides = [name for name in kernel.arg_names if name.startswith("stride_")]
    signature = {name: "*bf16" for name in kernel.arg_names if name.startswith("p_")}
    signature |= {name: "*fp32" for name in ("p_state", "p_A_log") if name in kernel.arg_names}
    signature |= {name: "fp32" for name in ("scale", "beta_scale", "eps") if name in kernel.arg_names}
    signature |= dict.fromkeys(strides, "i32") | {"T": "i32"}
    constants = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    if "p_bias" in signature and not bias:
        constants["p_bias"] = None
    if T == 1:  # Triton makes a constant of an integer that is 1
        constants["T"] = 1
    signature = {name: kind for name, kind in signature.items() if name not in constants}
    # Rows of q, k, v and z; those of a and b are short.
    divisible = [name for name in strides if name[-2] in "qkvz"]
    return compile_for(kernel, signature, constants, target, num_warps, divisible=divisible, enable_fp_fusion=FP_FUSION)


def both(target, is_kda, heads=ROWS[-1], K=128, V=128, T=None, width=4, bias=False):
    BV, num_warps = tile_config(heads, K, V)
    common = dict(HK=32 if is_kda else 16, HV=32, K=K, V=V, BK=triton.next_power_of_2(K), WIDTH=width)
    spec = dict(LOWER_BOUND=None, IS_KDA=is_kda, DECAY_IN_DTYPE=False)
    finish = dict(BV=triton.next_power_of_2(V), BW=triton.next_power_of_2(width))
    finish |= dict(NORM_IN_FP32=is_kda, GATE_IS_SILU=not is_kda)
    yield compiled(module._step_kernel, target, num_warps, {**common, **spec, "BV": BV}, T, bias)
    yield compiled(module._finish_kernel, target, module.FINISH_CONFIG.num_warps, {**common, **finish}, T)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("heads", ROWS)
@RULES
def test_every_row_of_the_table_for_one_token(target, heads, is_kda):
    check(*both(target, is_kda, heads, T=1))


@pytest.mark.parametrize("target", TARGETS)
@RULES
def test_several_tokens(target, is_kda):
    check(*both(target, is_kda, bias=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("K", "V"), [(96, 192), (256, 256)], ids=str)
def test_other_dims(target, K, V):
    check(*both(target, True, K=K, V=V, T=1))


@pytest.mark.parametrize("target", TARGETS)
def test_a_wide_convolution(target):
    check(*both(target, False, width=8, T=1))
