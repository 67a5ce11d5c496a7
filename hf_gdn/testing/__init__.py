"""Checks for people who add a kernel: what holds for every backend, the calls it holds for, and the tolerances.

A kernel is checked against the float64 oracle and against itself: split, packed, batched, with other strides, run
again. All of it in one line, without pytest:

    check_kernel(registry.get("chunk_gdn", "mine"))

The first case that fails raises `AssertionError` with the case's name, the tensor, the error and the budget. In pytest,
one test a case says more:

    @pytest.mark.parametrize("case", cases("chunk_gdn"), ids=str)
    def test_my_kernel(case):
        case.check(registry.get("chunk_gdn", "mine"))

A backend inside this repository gets all of it by one line in the table of tests/kernels/test_cases.py.

`compare` has the comparisons, `tolerances` the largest error of every op with its derivation, `invariants` what is
checked, `calls` how a call is cut and laid out, `call_changes` calls made of others, `small_cases` and `real_cases` the
calls. `compiled` compiles Triton kernels for cards that are not there; it needs Triton and is imported by its own name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .compare import assert_close, assert_no_worse, assert_same, error

if TYPE_CHECKING:
    from .case import Case
    from .kernel_cases import cases, check_kernel

__all__ = ["check_kernel", "cases", "Case", "assert_close", "assert_no_worse", "assert_same", "error"]
_LAZY = ("check_kernel", "cases", "Case")  # need the kernels' registry; comparing two tensors does not


def __getattr__(name: str):
    if name in _LAZY:
        from . import case, kernel_cases

        return getattr(case if name == "Case" else kernel_cases, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
