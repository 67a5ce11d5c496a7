"""Putting the mixer forward into transformers' layer classes, and taking it out again.

A class's ``forward`` is replaced and the original kept beside it. Models built before and after are served alike, since
instances look their forward up on the class; those that accelerate has hooked hold on to the function they found, so
they are told. Every change is checked before the first is made, and undone when one fails.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import inspect
import os
import pkgutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from .. import registry
from ..registry import logger, warn_once
from .mixer import Family, Settings, make_forward

__all__ = ["FamilyStatus", "PatchError", "Status", "all_families", "patch", "patched", "status", "unpatch", "unpatched"]

TESTED_TRANSFORMERS = ("5.17", "5.23")
_ARGUMENTS = ["self", "hidden_states", "cache_params", "attention_mask"]


class PatchError(RuntimeError):
    """transformers does not look as a family expects: a class is missing or its forward has other arguments."""


@dataclass(frozen=True)
class _Patch:
    family: Family
    cls: type
    original: Callable[..., Any]
    replacement: Callable[..., Any]
    settings: Settings


@dataclass(frozen=True)
class FamilyStatus:
    """What became of one family: `state` is "patched", "original", "absent" or "replaced by ..."."""

    name: str
    layer: str
    state: str


@dataclass(frozen=True)
class Status:
    """What `hf_gdn.status()` found; prints as a small table."""

    backend: str
    families: tuple[FamilyStatus, ...]
    transformers: str

    @property
    def active(self) -> bool:
        """Whether any family is patched."""
        return any(family.state == "patched" for family in self.families)

    def __str__(self) -> str:
        rows = [f"hf_gdn: backend {self.backend}, transformers {self.transformers}"]
        rows += [f"  {family.name:<16}{family.layer:<32}{family.state}" for family in self.families]
        return "\n".join(rows)


_patches: dict[str, _Patch] = {}
_lock = threading.RLock()


def all_families() -> dict[str, Family]:
    """All families by name: every module beside this one that has a FAMILY."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{info.name}"), "FAMILY", None)
        if family is not None:
            found[family.name] = family
    return found


def _choose(names: Iterable[str] | str | None) -> dict[str, Family]:
    """The families named, all for None. Raises ValueError for an unknown name."""
    known = all_families()
    wanted = [names] if isinstance(names, str) else list(known if names is None else names)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"unknown model family {', '.join(map(repr, unknown))}; families: {', '.join(known)}")
    return {name: known[name] for name in wanted}


def _absent(family: Family) -> bool:
    package = family.module.rpartition(".")[0]
    return importlib.util.find_spec(package) is None


def _layer_class(family: Family) -> Any:
    """The family's layer class. Raises PatchError when it, or its forward's arguments, are not as expected."""
    where = f"transformers {transformers.__version__}"
    try:
        module = importlib.import_module(family.module)
    except ModuleNotFoundError as error:
        raise PatchError(f"{family.name}: {where} has no module {family.module}") from error
    cls = getattr(module, family.class_name, None)
    if cls is None:
        raise PatchError(f"{family.name}: {family.module} of {where} has no class {family.class_name}")
    arguments = list(inspect.signature(cls.forward).parameters)
    if arguments[: len(_ARGUMENTS)] != _ARGUMENTS:
        raise PatchError(
            f"{family.name}: {family.class_name}.forward of {where} takes ({', '.join(arguments)}), "
            f"expected ({', '.join(_ARGUMENTS)}, ...)"
        )
    return cls


def _check_transformers() -> None:
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    low, high = (tuple(int(part) for part in version.split(".")) for version in TESTED_TRANSFORMERS)
    if not low <= (major, minor) <= high:
        warn_once(
            f"transformers {transformers.__version__} is outside the tested range "
            f"{TESTED_TRANSFORMERS[0]} to {TESTED_TRANSFORMERS[1]}"
        )


# A class whose forward was one function and is now another.
_Move = tuple[type, Callable[..., Any], Callable[..., Any]]


def _rebind(moves: list[_Move]) -> None:
    """Tell instances that hold a bound forward of their own: accelerate's hooks, and what removes them, and kernelize()
    leave the one they found in the instance.

    One walk over all objects for all classes: it takes tens of milliseconds in a large process.
    """
    if not moves:
        return
    for layer in gc.get_referrers(*(cls for cls, _, _ in moves)):
        for cls, old, new in moves:
            if isinstance(layer, cls):
                for name in ("forward", "_old_forward"):
                    if getattr(layer.__dict__.get(name), "__func__", None) is old:
                        layer.__dict__[name] = new.__get__(layer)


def _install(change: _Patch) -> _Move:
    change.cls.forward = change.replacement  # type: ignore[attr-defined]
    _patches[change.family.name] = change
    return change.cls, change.original, change.replacement


def _remove(change: _Patch) -> _Move:
    current = change.cls.__dict__.get("forward")
    if current is change.replacement:
        change.cls.forward = change.original  # type: ignore[attr-defined]
    else:
        logger.warning(
            "%s.forward was replaced by %s after hf_gdn patched it; that one is left in place",
            change.cls.__name__, _describe(current),
        )  # fmt: skip
    del _patches[change.family.name]
    return change.cls, change.replacement, change.original


def _describe(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


def _restore(wanted: dict[str, _Patch]) -> None:
    """Make the patches in force those of an earlier moment."""
    moves: list[_Move] = []
    try:
        for name, change in list(_patches.items()):
            if wanted.get(name) is not change:
                moves.append(_remove(change))
        for name, change in wanted.items():
            if name not in _patches:
                moves.append(_install(change))
    finally:
        _rebind(moves)


def patch(families: Iterable[str] | str | None = None, *, backend: str = "auto", strict: bool = False) -> Status:
    """Make the gated-delta-rule layers of transformers run on hf_gdn's kernels, process-wide.

    Call it before or after models are loaded, as often as you like; later calls change the settings of the families
    they name. `unpatch` undoes it exactly. With ``HF_GDN_DISABLE=1`` in the environment it does nothing.

    Args:
        families: names of model types such as ``"qwen3_next"``; None takes all that transformers has.
        backend: a backend of `hf_gdn.registry.backends()`, which then serves every call or raises; ``"auto"`` takes the
            fastest that can (or the one in ``HF_GDN_BACKEND``) and warns once when that is not the fastest there is.
        strict: raise for calls that would go to the original forward instead.

    Returns:
        What is patched now, see `status`.

    Raises:
        ValueError: an unknown family or backend.
        PatchError: transformers lacks a class that was asked for, or its forward takes other arguments.
            Nothing is patched then.
    """
    with _lock:
        if os.environ.get("HF_GDN_DISABLE", "0") not in ("", "0"):
            warn_once("HF_GDN_DISABLE is set: patch() does nothing")
            return status()
        registry.check_backend(backend)
        chosen = _choose(families)
        _check_transformers()
        settings = Settings(registry.DEFAULT_BACKEND if backend == "auto" else backend, strict)
        registry.check_backend(settings.backend)
        wanted = dict(_patches)
        for name, family in chosen.items():
            if families is None and _absent(family):
                continue
            cls = _layer_class(family)
            current = _patches.get(name)
            if current is not None and cls.__dict__.get("forward") is current.replacement:
                if current.settings == settings:
                    continue
                original = current.original
            else:
                original = cls.forward
            wanted[name] = _Patch(family, cls, original, make_forward(family, original, settings), settings)
        before = dict(_patches)
        try:
            _restore(wanted)
        except BaseException:
            _restore(before)
            raise
        return status()


def unpatch(families: Iterable[str] | str | None = None) -> Status:
    """Undo `patch`, for all families or those named: their classes' ``forward`` is the original object again.

    Where somebody else has replaced a forward since, theirs is left in place and a warning says so.

    Raises:
        ValueError: an unknown family.
    """
    with _lock:
        chosen = _choose(families)
        _restore({name: change for name, change in _patches.items() if name not in chosen})
        return status()


@contextlib.contextmanager
def patched(
    families: Iterable[str] | str | None = None, *, backend: str = "auto", strict: bool = False
) -> Iterator[Status]:
    """`patch` inside a with block; what was in force before is in force again after it."""
    before = dict(_patches)
    try:
        yield patch(families, backend=backend, strict=strict)
    finally:
        with _lock:
            _restore(before)


@contextlib.contextmanager
def unpatched() -> Iterator[Status]:
    """The original transformers inside a with block; what was in force before is in force again after it."""
    before = dict(_patches)
    try:
        yield unpatch()
    finally:
        with _lock:
            _restore(before)


def status() -> Status:
    """What is patched, family by family, on which backend."""
    rows = []
    for name, family in all_families().items():
        change = _patches.get(name)
        if _absent(family):
            state = f"absent from transformers {transformers.__version__}"
        elif change is None:
            state = "original"
        else:
            current = change.cls.__dict__.get("forward")
            state = "patched" if current is change.replacement else f"replaced by {_describe(current)}"
        rows.append(FamilyStatus(name, family.class_name, state))
    backend = ", ".join(dict.fromkeys(change.settings.backend for change in _patches.values())) or "none"
    return Status(backend, tuple(rows), transformers.__version__)


def original_forward(family: str) -> Callable[..., Any]:
    """transformers' own forward of a family's layers, patched or not."""
    change = _patches.get(family)
    cls: Any = _layer_class(all_families()[family])
    return change.original if change is not None else cls.forward


def families_in(model: torch.nn.Module) -> list[str]:
    """Names of the families that a model has layers of, text towers of multimodal ones included."""
    layers = {type(module).__name__ for module in model.modules()}
    return [name for name, family in all_families().items() if family.class_name in layers]


def layer_kernels(model: torch.nn.Module) -> dict[str, str]:
    """Which kernels a patched model's layers run on, without gradients.

    Returns:
        Layer's name in the model -> ``"chunk_gdn: triton, recurrent_gdn: triton"``, or ``"original"`` when its class is
        not patched.
    """
    names = {family.class_name for family in all_families().values()}
    layers = {}
    for name, module in model.named_modules():
        change = next((change for change in _patches.values() if isinstance(module, change.cls)), None)
        if change is not None:
            weight: Any = module.conv1d.weight  # type: ignore[union-attr]
            place = (
                weight.device.type,
                weight.dtype,
                tuple(change.family.dims(module)),
                change.settings.backend,
                False,
            )
            ops = (f"chunk_{change.family.op}", f"recurrent_{change.family.op}")
            layers[name] = ", ".join(f"{op}: {registry.select(op, *place).backend}" for op in ops)  # type: ignore[arg-type]
        elif type(module).__name__ in names:
            layers[name] = "original"
    return layers
