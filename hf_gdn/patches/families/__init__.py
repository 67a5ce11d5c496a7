"""The model families, one per file. README.md in this folder has the checklist for a new one."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from .base import Family


@functools.cache
def _found() -> tuple[Family, ...]:
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def all_families() -> dict[str, Family]:
    """All families by name: the FAMILY of every module in this folder that defines one."""
    return {family.name: family for family in _found()}
