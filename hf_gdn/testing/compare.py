"""How far a tensor is from the one it should be.

A comparison looks at the shape first, then for numbers that are not finite, then at the relative error, and its message
has the tensor's name, the error and the budget.
"""

from __future__ import annotations

import torch
from torch import Tensor


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm, ``|got - wanted| / |wanted|``, computed in float64.

    Infinite where the shapes differ or `got` is not finite; the norm of `got` where `wanted` is zero.

    Examples:
        >>> from hf_gdn.testing import error
        >>> wanted = torch.tensor([3.0, 4.0])
        >>> error(torch.tensor([3.0, 4.5]), wanted)
        0.1
        >>> error(torch.tensor([3.0, torch.nan]), wanted)
        inf
    """
    if got.shape != wanted.shape or not torch.isfinite(got).all():
        return float("inf")
    wanted = wanted.detach().double()
    got = got.detach().to(wanted.device).double()  # there, because some devices have no float64
    norm = wanted.norm().item()
    return (got - wanted).norm().item() / norm if norm else got.norm().item()


def assert_close(name: str, got: Tensor, wanted: Tensor, budget: float) -> None:
    """Check that the `error` of `got` is at most `budget`.

    Args:
        name: of the tensor, for the message.
        got: what was computed.
        wanted: what it should be, of the same shape, on any device and in any dtype.
        budget: largest relative error allowed; 0 for equal numbers.

    Raises:
        AssertionError: another shape, a number that is not finite, or a larger error.

    Examples:
        >>> from hf_gdn.testing import assert_close
        >>> assert_close("o", torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]), 0.2)
        >>> assert_close("o", torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]), 1e-5)
        Traceback (most recent call last):
        AssertionError: o: error 1.00e-01, budget 1.0e-05
    """
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
    finite = torch.isfinite(got)
    assert finite.all(), f"{name}: {int((~finite).sum())} of {got.numel()} values are not finite"
    found = error(got, wanted)
    assert found <= budget, f"{name}: error {found:.2e}, budget {budget:.1e}"


def assert_same(name: str, got: Tensor, wanted: Tensor) -> None:
    """Check that two tensors have the same shape and the same bits.

    Raises:
        AssertionError: they differ.

    Examples:
        >>> from hf_gdn.testing import assert_same
        >>> assert_same("o", torch.ones(2), torch.ones(2))
        >>> assert_same("o", torch.ones(2), torch.tensor([1.0, 1.5]))
        Traceback (most recent call last):
        AssertionError: o: 1 of 2 values differ, by up to 5.00e-01
    """
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
    assert torch.equal(got, wanted), (
        f"{name}: {int((got != wanted).sum())} of {got.numel()} values differ, "
        f"by up to {(got.double() - wanted.double()).abs().max().item():.2e}"
    )


def assert_no_worse(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Check that `got` is at most twice as far from `exact` as `plain` is, or two units in the last place of fp32.

    Args:
        name: of the tensor, for the message.
        got: a kernel's result.
        plain: the same computation in plain PyTorch with the same roundings.
        exact: the oracle's result in float64.

    Raises:
        AssertionError: it is further.

    Examples:
        >>> from hf_gdn.testing import assert_no_worse
        >>> exact = torch.ones(2, dtype=torch.float64)
        >>> assert_no_worse("o", torch.tensor([1.0, 1.03]), torch.tensor([1.0, 1.02]), exact)
    """
    # An error of zero cannot be doubled: 1e-7 is two units in the last place of fp32.
    assert_close(f"{name} beside plain PyTorch", got, exact, 2 * error(plain, exact) + 1e-7)
