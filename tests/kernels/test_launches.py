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

from hf_gdn.kernels.triton import gated_norm, prepared, step
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


def test_a_launch_is_of_the_kernel_that_triton_would_take(card):
    """Among calls that differ in one thing each, those that share a kernel are those that share it in Triton."""
    made = registry.ops()["gated_norm"].make_inputs(B=2, T=32, V=32, HK=2, HV=4, dtype=torch.bfloat16)
    room = torch.empty(made["o"].numel() + 8, dtype=torch.bfloat16)
    changes = {
        "same": {},
        "another address": dict(o=made["o"].clone()),
        "longer": {name: torch.cat((made[name],) * 2, 1) for name in ("o", "z")},
        "address not divisible by 16": dict(o=room[1 : 1 + made["o"].numel()].view(made["o"].shape)),
        "fp16": {name: made[name].half() for name in ("o", "z", "weight")},
        "fp32 weight": dict(weight=made["weight"].float()),
        "strided gate": dict(z=torch.cat((made["z"],) * 2, -1)[..., :32]),
        "another gate": dict(spec=made["spec"]._replace(gate="silu" if made["spec"].gate == "sigmoid" else "sigmoid")),
    }
    kernel, run = gated_norm._gated_norm_kernel, gated_norm.gated_norm

    def launched(change):
        prepared._compiled.clear()
        run(**{**made, **changes[change]})
        return next(iter(prepared._compiled.values())).hash

    alone = {change: launched(change) for change in changes}
    prepared._compiled.clear()
    for turn in range(2):
        for change in changes:
            card.hashes.clear()
            run(**{**made, **changes[change]})
            assert card.hashes == [alone[change]], (change, turn)
    shared = [change for change in changes if alone[change] == alone["same"]]
    assert shared == ["same", "another address", "longer", "strided gate"]
    assert len(set(alone.values())) == len(kernel.device_caches[0][0]) == 5


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


@VARIANTS
def test_gradients_around_the_rule_compile_once_for_all_lengths(variant, card):
    around = (f"backward_prologue_{variant}", "backward_gated_norm")
    for tokens in (64, 1, 63, 100, 127, 128, 2047):
        for op in around:
            triton_call(op, B=3, T=tokens)
        if tokens == 64:
            assert len(card.launches) == len(card.compilations) == 6
    assert len(card.compilations) == 6, card.compilations[6:]


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
