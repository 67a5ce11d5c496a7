"""The public functions that patch and unpatch, process-wide.

Models may be built before or after patching, because instances look up their forward on the class. All changes are
checked before the first one is made. If an exception interrupts patching, the previous state is restored (`swap`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from .. import registry
from ..cuda_graphs import make_get_compiled_call
from ..cuda_graphs import release as release_graphs
from ..environment import switch
from ..errors import PatchError
from ..log import warn_once
from ..upstream import seams, versions
from . import family_patch, in_force
from .families import all_families
from .families.base import Family
from .in_force import Table
from .inspect import Status, status
from .plan import Settings
from .self_check import SelfCheck
from .swap import Swap, class_attribute


def _select_families(names: Iterable[str] | str | None) -> dict[str, Family]:
    """Look up the named families; None selects all. Raises ValueError for an unknown name."""
    known = all_families()
    wanted = [names] if isinstance(names, str) else list(known if names is None else names)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"unknown model family {', '.join(map(repr, unknown))}; families: {', '.join(known)}")
    return {name: known[name] for name in wanted}


def _check_version() -> None:
    versions.check()
    if not versions.is_tested():
        warn_once(
            f"{versions.installed()} is outside the tested range {versions.OLDEST} to {versions.NEWEST}: "
            "the first time a patched model runs, one of its layers is compared with the original"
        )


def _graph_swap() -> Swap:
    """Return the swap of get_compiled_call: the current one if it is in force, else a new one."""
    for change in in_force.current().patches.values():
        if change.decode_swap is not None:
            return change.decode_swap
    owner = seams.compiled_call_class()
    here = class_attribute(owner, "get_compiled_call")
    return Swap(owner, "get_compiled_call", here, make_get_compiled_call(here, _has_graphs))


def _has_graphs(model: torch.nn.Module) -> bool:
    """Whether a model has layers of a family patched with ``cuda_graphs=True``."""
    patches = in_force.current().patches.values()
    classes = tuple(change.layer.cls for change in patches if change.decode_swap is not None)
    return any(isinstance(module, classes) for module in model.modules())


def _apply_or_roll_back(wanted: Table) -> Status:
    """Put `wanted` in force and return the status. If an exception is raised, restore the previous table."""
    before = in_force.current()
    try:
        in_force.put(wanted, before)
        return status()
    except BaseException:
        in_force.put(before, wanted)
        raise


def _give_up(name: str, why: str) -> None:
    """Unpatch a family whose patched layer differs from the original (`self_check`)."""
    with in_force.lock:
        if name in in_force.current().patches:
            _apply_or_roll_back(in_force.current().without(name, why))
    warn_once(f"{name} runs unpatched: {why}")


def patch(
    families: Iterable[str] | str | None = None,
    *,
    backend: str = "auto",
    strict: bool = False,
    cuda_graphs: bool = False,
) -> Status:
    """Make the gated-delta-rule layers of transformers run on hf_gdn's kernels, process-wide.

    Call it before or after loading models, any number of times. Later calls change the settings of the families they
    name. `unpatch` undoes it exactly. It has no effect if ``HF_GDN_DISABLE=1`` is set in the environment.

    A family stays original if it does not fit the installed transformers: a class is missing, a forward takes other
    arguments, or caches lack what the layers need. Its models run unpatched; one warning and `status` give the reason.
    If transformers is newer than the tested range, a patched layer is also compared with the original the first time a
    model of its family runs. If the two differ, the family stays original.

    Args:
        families: names of model types such as ``"qwen3_next"``. None selects all that transformers has and that fit.
        backend: a name from `hf_gdn.registry.backends()`; this backend then serves every call or raises. ``"auto"``
            takes the first backend that serves the call, fastest first (or the one in ``HF_GDN_BACKEND``), and warns
            once if it is not the fastest.
        strict: raise an error instead of running the original forward or, with ``families=None``, leaving a family
            original.
        cuda_graphs: with a static cache on a CUDA device, let ``generate`` replay its decode steps from CUDA graphs
            (`hf_gdn.cuda_graphs`) instead of compiling them. Anything that cannot be captured falls back to eager
            execution; one warning gives the reason. ``generate(..., disable_compile=True)`` turns it off for one call.

    Returns:
        The new status, see `status`.

    Raises:
        ValueError: unknown family or backend, or HF_GDN_DISABLE is neither on nor off.
        PatchError: the transformers version is unsupported, or a named family (with `strict`, any family) does not fit
            it. Nothing is patched then.

    Examples:
        >>> hf_gdn.patch("qwen3_next", backend="eager").active
        True
        >>> model.generate(**inputs, max_new_tokens=4).shape
        torch.Size([1, 12])
    """
    if not cuda_graphs:
        release_graphs()  # first: if patching fails below, models simply capture again
    return _patch_families(families, backend, strict, cuda_graphs)


def _patch_families(families: Iterable[str] | str | None, backend: str, strict: bool, cuda_graphs: bool) -> Status:
    with in_force.lock:
        if switch("HF_GDN_DISABLE"):
            warn_once("HF_GDN_DISABLE is set: patch() does nothing")
            return status()
        registry.check_backend(backend)
        chosen = _select_families(families)
        _check_version()
        settings = Settings(registry.DEFAULT_BACKEND if backend == "auto" else backend, strict)
        registry.check_backend(settings.backend)
        seam = _graph_swap() if cuda_graphs else None
        wanted = in_force.current()
        for family in chosen.values():
            if families is None and not seams.has_module(family.module):
                continue
            try:
                wanted = _with(wanted, family, settings, seam)
            except PatchError as error:
                if families is not None or strict:
                    raise
                wanted = wanted.without(family.name, str(error).removeprefix(f"{family.name}: "))
        for name, why in wanted.misfits.items():
            warn_once(f"{name} is left original: {why}")
        missing = family_patch.rollback_missing()
        if missing is not None:
            warn_once(f"rolling tokens back, which assisted decoding needs, is not available: {missing}")
        return _apply_or_roll_back(wanted)


def _with(table: Table, family: Family, settings: Settings, graph_swap: Swap | None) -> Table:
    """Return the table with a family patched. Raises PatchError if the family does not fit transformers."""
    now = table.patches.get(family.name)
    if (
        now is None
        or now.settings != settings
        or class_attribute(now.layer.cls, "forward") is not now.layer.replacement
    ):

        def first_run(layer: Swap) -> SelfCheck | None:
            return None if versions.is_tested() else SelfCheck(family, settings, layer, _give_up)

        now = family_patch.build(family, settings, now, first_run)
    if now.decode_swap is not graph_swap:
        now = replace(now, decode_swap=graph_swap)
    rest = table.without(family.name)
    return table if table.patches.get(family.name) is now else Table({**table.patches, family.name: now}, rest.misfits)


def unpatch(families: Iterable[str] | str | None = None) -> Status:
    """Undo `patch` for the named families, or for all: their classes' ``forward`` is the original object again.

    If another library has replaced a forward since, its replacement is left in place and a warning is logged.

    Raises:
        ValueError: unknown family.

    Examples:
        >>> hf_gdn.patch().active, hf_gdn.unpatch().active
        (True, False)
    """
    with in_force.lock:
        chosen = _select_families(families)
        release_graphs()
        wanted = in_force.current()
        for name in chosen:
            wanted = wanted.without(name)
        return _apply_or_roll_back(wanted)


@contextlib.contextmanager
def patched(
    families: Iterable[str] | str | None = None,
    *,
    backend: str = "auto",
    strict: bool = False,
    cuda_graphs: bool = False,
) -> Iterator[Status]:
    """Context manager that patches like `patch` and restores the previous patches on exit.

    In training the backward belongs inside too: checkpointing runs the forward again in it.

    Examples:
        >>> with hf_gdn.patched(strict=True):
        ...     logits = model(**inputs).logits
        >>> hf_gdn.status().active
        False
    """
    with in_force.restored():
        yield _patch_families(families, backend, strict, cuda_graphs)


@contextlib.contextmanager
def unpatched() -> Iterator[Status]:
    """Context manager that runs the original transformers and restores the previous patches on exit.

    Examples:
        >>> _ = hf_gdn.patch()
        >>> with hf_gdn.unpatched():
        ...     wanted = model(**inputs).logits
        >>> bool((model(**inputs).logits - wanted).abs().max() < 1e-4)
        True
    """
    with in_force.restored():
        yield _apply_or_roll_back(Table())  # captured CUDA graphs stay valid after the block
