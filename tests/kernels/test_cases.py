"""Every kernel keeps every invariant of the table in `hf_gdn.testing`: on a CPU, in Triton's interpreter, on a GPU.

A new backend gets all of it by one row here. How far calls in other company may be apart is the backend's own promise:
0 asks for equal bits.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from hf_gdn import registry
from hf_gdn.kernels.triton.runtime import INTERPRET
from hf_gdn.testing import cases, check_kernel
from hf_gdn.testing.invariants import host_never_asked
from hf_gdn.testing.tolerances import SAME_SUMS

CPU_BACKENDS = {  # by name: how far results may be apart
    "eager": SAME_SUMS,  # PyTorch's products depend on the size of the batch
    "numba": 0.0,
}


def served(backend: str, device_type: str = "cpu") -> list:
    """The cases of all ops that a backend has a kernel for and serves."""
    kernels = [kernel for op in registry.ops() for kernel in registry.kernels(op) if kernel.backend == backend]
    found = [(kernel, case) for kernel in kernels for case in cases(kernel.op, device_type)]
    return [pytest.param(k, case, id=str(case)) for k, case in found if not case.why_not(k, device_type)]


def on_a_cpu() -> list:
    found = [(backend, param) for backend in CPU_BACKENDS for param in served(backend)]
    # The host is the device there: reading a value costs nothing.
    found = [(backend, p) for backend, p in found if p.values[1].invariant is not host_never_asked]
    return [pytest.param(*p.values, CPU_BACKENDS[backend], id=f"{backend}-{p.id}") for backend, p in found]


@pytest.mark.parametrize(("kernel", "case", "apart"), on_a_cpu())
def test_a_kernel_for_a_cpu_keeps_the_invariant(kernel, case, apart):
    case.check(kernel, apart=apart)


def interpreted() -> list:
    """Without --all, not in float16 and not with int64 bounds, beside bfloat16 and int32: the interpreter is slow."""
    found = [p for p in served("triton") if p.values[1].interpret]
    slow = re.compile(r"(^|_)(float16|int64)(_|$)")
    return [
        pytest.param(*p.values, id=p.id, marks=pytest.mark.extended if slow.search(p.values[1].name) else ())
        for p in found
    ]


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("kernel", "case"), interpreted())
def test_a_triton_kernel_keeps_the_invariant_in_the_interpreter(kernel, case):
    case.check(kernel)


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case"), served("triton", "cuda"))
def test_a_triton_kernel_keeps_the_invariant_on_a_gpu(kernel, case):
    case.check(kernel, "cuda")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("op", registry.ops())
def test_cases_have_names_of_their_own(op, device_type):
    names = [str(case) for case in cases(op, device_type)]
    assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})


def changed(change) -> registry.Kernel:
    """The eager recurrent kernel, its results changed by ``change(inputs, o, final_state)``."""
    eager = registry.get("recurrent_gdn", "eager")

    def fn(**inputs):
        o, state = eager.fn(**inputs)
        return change(inputs, o, state)

    return dataclasses.replace(eager, backend="wrong", fn=fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda inputs, o, state: (o * (1 + 2e-5), state),
            "recurrent_gdn-matches_reference-.*: o: error 2.0.e-05, budget 1.0e-05",
        ),
        (lambda inputs, o, state: (torch.full_like(o, torch.nan), state), "values are not finite"),
        (lambda inputs, o, state: (o.double(), state), "o is torch.float64, expected torch.float32"),
        (lambda inputs, o, state: (o, state.clone()), "inplace=True returned another tensor"),
        (lambda inputs, o, state: (inputs["q"].zero_().new_empty(0), o, state)[1:], "an argument: .* values differ"),
    ],
    ids=["inaccurate", "not finite", "dtype", "not in place", "writes to its inputs"],
)
def test_a_wrong_kernel_fails(change, message):
    with pytest.raises(AssertionError, match=message):
        check_kernel(changed(change), apart=SAME_SUMS)
