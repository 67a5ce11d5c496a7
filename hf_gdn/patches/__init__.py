"""Putting the mixer forward into transformers' layer classes, and taking it out again.

What a family swaps: its layers' ``forward``, and its text model's, which tells the layers of packed sequences. With any
family comes what transformers' caches lack (`hf_gdn.caches`). Models built before and after are served alike, since
instances look their forward up on the class. Every change is checked before the first is made; whatever is raised
half-way, all is as it was (`swap`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .. import graphs, registry
from ..caches import batch, positions, rewind
from ..registry import warn_once
from .drafts import make_get_candidate_generator
from .family import Family
from .mixer import Settings, make_forward
from .packing import MODEL_ARGUMENTS, make_model_forward
from .swap import MISSING, Swap, describe, foreign_forward, move, own

__all__ = ["FamilyStatus", "PatchError", "Status", "all_families", "patch", "patched", "status", "unpatch", "unpatched"]

TESTED_TRANSFORMERS = ("5.17", "5.23")
_ARGUMENTS = ["self", "hidden_states", "cache_params", "attention_mask"]


class PatchError(RuntimeError):
    """transformers does not look as a family expects: a class is missing or its forward has other arguments."""


@dataclass(frozen=True)
class _Patch:
    family: Family
    settings: Settings
    layer: Swap
    others: tuple[Swap, ...]
    graphs: Swap | None = None  # of get_compiled_call, the same for all families that have CUDA graphs


@dataclass(frozen=True)
class FamilyStatus:
    """What became of one family: `state` is "patched", "original", "absent" or "replaced by ..."; `cuda_graphs` says
    whether ``generate`` replays the decode steps of its models."""

    name: str
    layer: str
    state: str
    cuda_graphs: bool = False


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
        rows += [
            f"  {family.name:<16}{family.layer:<32}{family.state}{', CUDA graphs' if family.cuda_graphs else ''}"
            for family in self.families
        ]
        return "\n".join(rows)


_patches: dict[str, _Patch] = {}  # what is in force; replaced as a whole, never changed
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


def _class(family: Family, name: str, arguments: list[str], at_start: bool) -> Any:
    """A class of the family's module. Raises PatchError when it, or its forward's arguments, are not as expected."""
    where = f"transformers {transformers.__version__}"
    try:
        module = importlib.import_module(family.module)
    except ModuleNotFoundError as error:
        raise PatchError(f"{family.name}: {where} has no module {family.module}") from error
    cls = getattr(module, name, None)
    if cls is None:
        raise PatchError(f"{family.name}: {family.module} of {where} has no class {name}")
    found = list(inspect.signature(cls.forward).parameters)
    if found[: len(arguments)] != arguments if at_start else not set(arguments) <= set(found):
        raise PatchError(
            f"{family.name}: {name}.forward of {where} takes ({', '.join(found)}), "
            f"expected ({', '.join(arguments)}, ...)"
        )
    return cls


def _layer_class(family: Family) -> Any:
    return _class(family, family.class_name, _ARGUMENTS, at_start=True)


def _check_transformers() -> None:
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    low, high = (tuple(int(part) for part in version.split(".")) for version in TESTED_TRANSFORMERS)
    if not low <= (major, minor) <= high:
        warn_once(
            f"transformers {transformers.__version__} is outside the tested range "
            f"{TESTED_TRANSFORMERS[0]} to {TESTED_TRANSFORMERS[1]}"
        )


def _swap(cls: type, name: str, make: Callable[[Any], Any], current: _Patch | None) -> Swap:
    """The swap of a class's attribute, over the original that a patch in force has kept."""
    value = own(cls, name)
    for swap in (current.layer, *current.others) if current is not None else ():
        if (swap.cls, swap.name) == (cls, name) and value is swap.replacement:
            value = swap.original
    return Swap(cls, name, value, make(value))


def _make(family: Family, settings: Settings, current: _Patch | None) -> _Patch:
    """The patch of a family. Raises PatchError where transformers is not as expected."""
    cls, model = _layer_class(family), _class(family, family.model_name, MODEL_ARGUMENTS, at_start=False)
    layer = _swap(cls, "forward", partial(make_forward, family, settings=settings), current)
    # What says that states cannot be rewound, for which generate() refuses assistants: now they can (`caches.rewind`).
    stateful = next(base for base in model.__mro__ if "_is_stateful" in vars(base))
    others = (
        _swap(model, "forward", make_model_forward, current),
        _swap(stateful, "_is_stateful", lambda _: False, current),
        _swap(stateful, "_get_candidate_generator", make_get_candidate_generator, current),
    )
    return _Patch(family, settings, layer, others)


_CACHE_SWAPS = [
    Swap(cls, method.__name__, own(cls, method.__name__), method)
    for cls, methods in ((LinearAttentionCacheLayerMixin, batch.METHODS + rewind.METHODS), (Cache, positions.METHODS))
    for method in methods
]


def _graph_swap() -> Swap:
    """The swap of get_compiled_call, the one in force if there is one."""
    for change in _patches.values():
        if change.graphs is not None:
            return change.graphs
    here = own(PreTrainedModel, "get_compiled_call")
    if here is MISSING:
        raise PatchError(f"cuda_graphs: PreTrainedModel of transformers {transformers.__version__} compiles no calls")
    return Swap(PreTrainedModel, "get_compiled_call", here, graphs.make_get_compiled_call(here, _has_graphs))


def _has_graphs(model: torch.nn.Module) -> bool:
    """Whether a model has layers of a family that is patched with CUDA graphs."""
    classes = tuple(change.layer.cls for change in _patches.values() if change.graphs is not None)
    return any(isinstance(module, classes) for module in model.modules())


def _swaps(patches: dict[str, _Patch]) -> list[Swap]:
    """All swaps of some patches. What caches gain comes with the first of them."""
    swaps = (swap for change in patches.values() for swap in (change.layer, *change.others, change.graphs))
    return [swap for swap in swaps if swap is not None] + (_CACHE_SWAPS if patches else [])


def _put(wanted: dict[str, _Patch], instead_of: dict[str, _Patch]) -> None:
    """Put `wanted` in force where `instead_of` is, or the beginning of a move either way: it can be run again."""
    global _patches
    with _lock:
        move(_swaps(instead_of), _swaps(wanted))
        _patches = wanted


def _change(wanted: dict[str, _Patch]) -> Status:
    """Put `wanted` in force and say so; when anything is raised meanwhile, what was in force is again."""
    before = _patches
    try:
        _put(wanted, before)
        return status()
    except BaseException:
        _put(before, wanted)
        raise


@contextlib.contextmanager
def _afterwards_as_before() -> Iterator[None]:
    """What is in force now is again after the block, whatever is raised in it or on the way."""
    before = _patches
    try:
        yield
    finally:
        try:
            _put(before, _patches)
        except BaseException:
            _put(before, _patches)
            raise
        if all(change.graphs is None for change in _patches.values()):
            graphs.release()


def patch(
    families: Iterable[str] | str | None = None,
    *,
    backend: str = "auto",
    strict: bool = False,
    cuda_graphs: bool = False,
) -> Status:
    """Make the gated-delta-rule layers of transformers run on hf_gdn's kernels, process-wide.

    Call it before or after models are loaded, as often as you like; later calls change the settings of the families
    they name. `unpatch` undoes it exactly. With ``HF_GDN_DISABLE=1`` in the environment it does nothing.

    Args:
        families: names of model types such as ``"qwen3_next"``; None takes all that transformers has.
        backend: a backend of `hf_gdn.registry.backends()`, which then serves every call or raises; ``"auto"`` takes the
            fastest that can (or the one in ``HF_GDN_BACKEND``) and warns once when that is not the fastest there is.
        strict: raise for calls that would go to the original forward instead.
        cuda_graphs: let ``generate`` with a static cache on a CUDA device replay its decode steps from CUDA graphs
            (`hf_gdn.graphs`) rather than compile them. What cannot be a graph runs as ever, with one warning that
            says why. ``generate(..., disable_compile=True)`` does without.

    Returns:
        What is patched now, see `status`.

    Raises:
        ValueError: an unknown family or backend.
        PatchError: transformers lacks a class that was asked for, or its forward takes other arguments.
            Nothing is patched then.
    """
    if not cuda_graphs:
        graphs.release()  # first, since nothing can be undone by halves: who still has graphs captures them again
    return _patch_families(families, backend, strict, cuda_graphs)


def _patch_families(families: Iterable[str] | str | None, backend: str, strict: bool, cuda_graphs: bool) -> Status:
    with _lock:
        if os.environ.get("HF_GDN_DISABLE", "0") not in ("", "0"):
            warn_once("HF_GDN_DISABLE is set: patch() does nothing")
            return status()
        registry.check_backend(backend)
        chosen = _choose(families)
        _check_transformers()
        settings = Settings(registry.DEFAULT_BACKEND if backend == "auto" else backend, strict)
        registry.check_backend(settings.backend)
        seam = _graph_swap() if cuda_graphs else None
        wanted = dict(_patches)
        for name, family in chosen.items():
            if families is None and _absent(family):
                continue
            now = _patches.get(name)
            if now is None or now.settings != settings or own(now.layer.cls, "forward") is not now.layer.replacement:
                wanted[name] = replace(_make(family, settings, now), graphs=seam)
            elif now.graphs is not seam:
                wanted[name] = replace(now, graphs=seam)
        return _change(wanted)


def unpatch(families: Iterable[str] | str | None = None) -> Status:
    """Undo `patch`, for all families or those named: their classes' ``forward`` is the original object again.

    Where somebody else has replaced a forward since, theirs is left in place and a warning says so.

    Raises:
        ValueError: an unknown family.
    """
    with _lock:
        chosen = _choose(families)
        graphs.release()
        return _change({name: change for name, change in _patches.items() if name not in chosen})


@contextlib.contextmanager
def patched(
    families: Iterable[str] | str | None = None,
    *,
    backend: str = "auto",
    strict: bool = False,
    cuda_graphs: bool = False,
) -> Iterator[Status]:
    """`patch` inside a with block; what was in force before is in force again after it."""
    with _afterwards_as_before():
        yield _patch_families(families, backend, strict, cuda_graphs)


@contextlib.contextmanager
def unpatched() -> Iterator[Status]:
    """The original transformers inside a with block; what was in force before is in force again after it."""
    with _afterwards_as_before():
        yield _change({})  # keeps CUDA graphs for after the block


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
            current = own(change.layer.cls, "forward")
            state = "patched" if current is change.layer.replacement else f"replaced by {describe(current)}"
        seam = change.graphs if change is not None else None
        replays = seam is not None and own(seam.cls, seam.name) is seam.replacement
        rows.append(FamilyStatus(name, family.class_name, state, replays))
    backend = ", ".join(dict.fromkeys(change.settings.backend for change in _patches.values())) or "none"
    return Status(backend, tuple(rows), transformers.__version__)


def original_forward(family: str) -> Callable[..., Any]:
    """transformers' own forward of a family's layers, patched or not."""
    change = _patches.get(family)
    cls: Any = _layer_class(all_families()[family])
    return change.layer.original if change is not None else cls.forward


def families_in(model: torch.nn.Module) -> list[str]:
    """Names of the families that a model has layers of, text towers of multimodal ones included."""
    layers = {type(module).__name__ for module in model.modules()}
    return [name for name, family in all_families().items() if family.class_name in layers]


def layer_kernels(model: torch.nn.Module) -> dict[str, str]:
    """Which kernels a patched model's layers run on, without gradients.

    Returns:
        Layer's name in the model -> ``"chunk_gdn: triton, step_gdn: triton"``, or ``"original"`` when its class is
        not patched, or ``"replaced by ..."`` when the layer was given another forward of its own.
    """
    names = {family.class_name for family in all_families().values()}
    layers = {}
    for name, module in model.named_modules():
        change = next((change for change in _patches.values() if isinstance(module, change.layer.cls)), None)
        if change is None:
            if type(module).__name__ in names:
                layers[name] = "original"
            continue
        theirs = foreign_forward(module, change.layer)
        layers[name] = f"replaced by {theirs}" if theirs else _kernels(module, change)
    return layers


def _kernels(layer: Any, change: _Patch) -> str:
    weight, dims = layer.conv1d.weight, change.family.dims(layer)
    request = (weight.device.type, weight.dtype, (*dims,), change.settings.backend, False)
    chunk, recurrent, step = (f"{kind}_{change.family.op}" for kind in ("chunk", "recurrent", "step"))
    decode = registry.select(recurrent, *request).backend
    op = recurrent if registry.find(step, decode) is None else step
    return f"{chunk}: {registry.select(chunk, *request).backend}, {op}: {decode}"
