"""Launches on a card that is not there: how many, how many compilations, and what happens when one is impossible."""

import pytest
import torch

from hf_gdn import registry, verification
from hf_gdn.kernels.triton.runtime import HAS_TRITON, INTERPRET
from hf_gdn.operators import call_step
from hf_gdn.testing import assert_close, assert_same
from hf_gdn.testing.calls import mapped
from hf_gdn.testing.case import FAMILIES
from hf_gdn.testing.tolerances import SAME_SUMS

if INTERPRET or not HAS_TRITON:
    pytest.skip("needs Triton's compiler: the package, and no TRITON_INTERPRET", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from hf_gdn.kernels.triton import step
from hf_gdn.testing.absent_driver import absent_card

SIZES = dict(HK=16, HV=16, K=16, V=16, dtype=torch.bfloat16)
VARIANTS = pytest.mark.parametrize("variant", ["gdn", "kda"])


@pytest.fixture
def card():
    with absent_card("sm_90") as log:
        yield log


def triton_call(op, **sizes):
    spec = FAMILIES["kimi_linear" if op.endswith("kda") else "qwen3_next"][1] if "chunk" not in op else {}
    call = registry.ops()[op].make_inputs(**{**SIZES, **spec, **sizes})
    return registry.get(op, "triton").fn(**call)


@VARIANTS
def test_a_step_is_two_launches_compiled_once(variant, card):
    for _ in range(3):
        triton_call(f"step_{variant}", B=2, T=1)
    assert card.launches == ["_step_kernel", "_finish_kernel"] * 3
    assert [name for name, _ in card.compilations] == ["_step_kernel", "_finish_kernel"]
    for tokens in (2, 3, 16):
        triton_call(f"step_{variant}", B=2, T=tokens)
    assert len(card.compilations) == 4, "all numbers of tokens but one share their kernels"


@VARIANTS
def test_a_step_does_not_mix_up_layouts(variant, card):
    """Other strides, dtypes, addresses or specs are other launches."""
    call = registry.ops()[f"step_{variant}"].make_inputs(**SIZES)
    kernel, made = registry.get(f"step_{variant}", "triton"), len(step._launchers)
    x = call["projected"]
    apart = {**call, "projected": mapped(lambda x: x.contiguous(), x)}
    room = torch.empty(call["state"].numel() + 1)[1:].view(call["state"].shape)
    moved = {**call, "state": room}
    other = {**call, "spec": call["spec"]._replace(gate="sigmoid")}
    in_fp32 = {**call, "weights": call["weights"]._replace(A_log=call["weights"].A_log.float())}
    for number, changed in enumerate((call, apart, moved, other, in_fp32), 1):
        for _ in range(2):
            kernel.fn(**changed)
        assert len(step._launchers) == made + number


@pytest.mark.parametrize(("batch", "heads"), [(1, 2), (3, 16)])
@VARIANTS
def test_a_prefill_compiles_once_for_all_lengths(variant, batch, heads, card):
    sizes = dict(B=batch, HK=heads, HV=heads)
    for tokens in (64, 1, 63, 100, 127, 128, 2047):
        triton_call(f"chunk_{variant}", **sizes, T=tokens)
        triton_call(f"prologue_{variant}", **sizes, T=tokens)
        triton_call("gated_norm", **sizes, T=tokens)
        if tokens == 64:
            first = len(card.compilations)
    assert first and len(card.compilations) == first, card.compilations[first:]


@pytest.fixture
def no_second_kernel(monkeypatch):
    """The step's second kernel asks for more than the card has, as it shows once it is compiled."""

    def warmup(*args, **kwargs):
        raise OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(step._finish_kernel, "warmup", warmup, raising=False)
    verification.forget()
    yield
    verification.forget()


@VARIANTS
def test_a_second_kernel_that_does_not_compile_leaves_the_cache_alone(variant, card, no_second_kernel):
    op = f"step_{variant}"
    call = registry.ops()[op].make_inputs(**{**SIZES, "dtype": torch.float32})
    before = {name: call[name].clone() for name in ("conv_state", "state")}
    with pytest.raises(OutOfResources):
        registry.get(op, "triton").fn(**call)
    for name, x in before.items():
        assert_same(name, call[name], x)
    assert card.launches == [], "nothing was launched"


@VARIANTS
def test_and_eager_serves_the_step(variant, card, no_second_kernel):
    op = f"step_{variant}"
    call = registry.ops()[op].make_inputs(**{**SIZES, "dtype": torch.float32})
    wanted_call = mapped(torch.clone, call)
    wanted = registry.get(op, "eager").fn(**wanted_call)
    assert_close("y", call_step(registry.get(op, "triton"), **call), wanted, SAME_SUMS)
    for name in ("conv_state", "state"):
        assert_close(name, call[name], wanted_call[name], SAME_SUMS)
