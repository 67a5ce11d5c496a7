"""Verdicts on disk: one small file for each kernel, kind of call and device, so that a second process checks nothing.

A file's name is a hash of everything that the verdict depends on: this package, the kernel's source, the compiler, the
driver and the model of the device. Files are written whole or not at all, so processes need no lock: two that check at
the same time write the same. A file that cannot be read counts as absent.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..cache_folder import cache_folder
from ..errors import reason
from ..files import write_whole
from ..log import logger
from ..registry import Kernel, Request
from .trial import Verdict

# Packages that decide what a kernel is compiled to.
_COMPILERS = ("hf-gdn", "torch", "triton", "flash-linear-attention", "fla-core", "numba", "llvmlite")
# Where the drivers of NVIDIA's and AMD's devices say their version.
_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


def key(kernel: Kernel, request: Request, device: torch.device) -> dict[str, Any]:
    """Everything that a verdict depends on."""
    return {
        "op": kernel.op,
        "backend": kernel.backend,
        "dtype": str(request.dtype).removeprefix("torch."),
        "heads": list(request.dims),
        "device": model_of(device),
        "source": _source(kernel.fn),
        **_machine(),
    }


def load(kept: dict[str, Any]) -> Verdict | None:
    """The verdict for a `key`, None if there is none or it cannot be read."""
    try:
        found = json.loads(_path(kept).read_text(encoding="utf-8"))
        if found["key"] != kept or not isinstance(found["refused"], str | None):
            return None
        errors = {name: (float(off), float(bar)) for name, (off, bar) in found["errors"].items()}
        return Verdict(found["refused"], errors, float(found["seconds"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def save(kept: dict[str, Any], verdict: Verdict) -> None:
    """Keep a verdict. Where that is not possible every process checks anew, which is logged."""
    path = _path(kept)
    text = json.dumps({"key": kept, **vars(verdict)}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    except OSError as error:
        logger.info("the verdict on a kernel could not be kept in %s: %s", path.parent, reason(error))


def model_of(device: torch.device) -> str:
    """The model of a device: what a kernel is compiled for."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    arch = getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}")
    return f"{properties.name} ({arch})"


def _path(kept: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "verdicts" / f"{digest[:32]}.json"


@functools.cache
def _machine() -> dict[str, str]:
    found = {}
    for package in _COMPILERS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    for file in _DRIVERS:
        try:
            found["driver"] = Path(file).read_text(encoding="utf-8").partition("\n")[0]
        except OSError:
            continue
    return found


@functools.cache
def _source(fn: Any) -> str:
    """A hash of the folder with a kernel's source, whose files share helpers."""
    try:
        folder = Path(inspect.getfile(inspect.unwrap(fn))).parent
    except TypeError:  # not a Python function
        return "unknown"
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
