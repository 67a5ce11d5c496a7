"""Save snapshots as safetensors files and load them. Loading a file executes no code from it.

Header (``__metadata__``, strings): ``format`` ``"hf_gdn.snapshot"``, ``version``, ``model`` (fingerprint, or empty),
``length`` (tokens), ``batch_size``, ``dtype`` (of keys and values), ``layers`` (kind of each layer, comma-separated),
``sha256`` (of all these values and of every tensor). Tensors: ``layers.<index>.<part>``, see `layers`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import SnapshotError
from ...files import write_whole
from .api import Snapshot, check, check_model
from .layers import Parts

FORMAT = "hf_gdn.snapshot"
VERSION = 1
_KEYS = ("format", "version", "model", "length", "batch_size", "dtype", "layers")


def save(snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
    """Write a snapshot to a file that `load` reads.

    The file is written atomically: a crash leaves either the complete previous file or the complete new one.

    Raises:
        OSError: the file cannot be written. A previous file is kept.
        SafetensorError: a tensor cannot be written. A previous file is kept.

    Examples:
        >>> from transformers import DynamicCache
        >>> from hf_gdn.caches import load, save, snapshot
        >>> cache = DynamicCache(config=model.config)
        >>> _ = model(**inputs, cache=cache)
        >>> save(snapshot(cache, model), "prompt.safetensors")
        >>> load("prompt.safetensors", model).length
        8
    """
    tensors = {
        f"layers.{index}.{name}": part.detach().contiguous().cpu()
        for index, parts in enumerate(snapshot.layers)
        for name, part in parts.items()
    }
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": snapshot.model or "",
        "length": str(snapshot.length),
        "batch_size": str(snapshot.batch_size),
        "dtype": _dtype(snapshot),
        "layers": ",".join(snapshot.kinds),
    }
    header["sha256"] = _digest(header, tensors)
    write_whole(path, lambda beside: save_file(tensors, beside, metadata=header))


def load(
    path: str | os.PathLike[str], model: nn.Module | str | None = None, device: torch.device | str | int = "cpu"
) -> Snapshot:
    """Read a snapshot from a file.

    Args:
        model: the model that uses the snapshot, or its fingerprint; a snapshot of another model is refused.
        device: device of its tensors; `restore` moves them to the cache's devices.

    Raises:
        SnapshotError: the file is not a snapshot, is truncated or damaged, or has another version or model.
        OSError: the file cannot be opened.

    Examples:
        >>> from hf_gdn.caches import load
        >>> load("nothing.safetensors", model)
        Traceback (most recent call last):
        ...
        FileNotFoundError: ...
    """
    with open(path, "rb"):  # raises a plain OSError, unlike safetensors
        pass
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            _check_header(path, header)
            # Copied, because the file may be deleted or overwritten before the tensors are used.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise SnapshotError(f"{path} is not a snapshot or is damaged: {error}") from None
    if header["sha256"] != _digest(header, tensors):
        raise SnapshotError(f"{path} is damaged: its contents do not match the checksum in its header")
    kinds = tuple(header["layers"].split(",")) if header["layers"] else ()
    layers: tuple[Parts, ...] = tuple({} for _ in kinds)
    for name, tensor in tensors.items():
        match = re.fullmatch(r"layers\.([0-9]{1,6})\.([a-z_]+(?:\.[0-9]+)?)", name)
        if match is None or int(match[1]) >= len(kinds):
            raise SnapshotError(f"{path} has a tensor {name!r}, which is invalid in a snapshot of {len(kinds)} layers")
        layers[int(match[1])][match[2]] = tensor
    found = Snapshot(kinds, layers, int(header["length"]), header["model"] or None, checked=not header["model"])
    try:
        check(found)
        if (str(found.batch_size), _dtype(found)) != (header["batch_size"], header["dtype"]):
            raise SnapshotError("batch size or dtype in its header differ from its tensors")
        if model is not None:
            check_model(found, model)
            found = found._with(lambda _, part: part, checked=True)
    except SnapshotError as error:
        raise SnapshotError(f"{path}: {error}") from None
    return found.to(device)


def _check_header(path: str | os.PathLike[str], header: Mapping[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise SnapshotError(
            f"{path} is not a snapshot: the format in its header is {header.get('format')!r}, expected {FORMAT!r}"
        )
    if header.get("version") != str(VERSION):
        raise SnapshotError(
            f"{path} is a snapshot of version {header.get('version')}; this hf_gdn reads version {VERSION}"
        )
    missing = [key for key in (*_KEYS, "sha256") if key not in header]
    if missing:
        raise SnapshotError(f"{path}: its header lacks {', '.join(missing)}")
    if not re.fullmatch(r"[0-9]{1,15}", header["length"]):
        raise SnapshotError(
            f"{path}: its header gives a length of {header['length'][:40]!r}, expected a number of tokens"
        )
    if header["model"] and not re.fullmatch(r"[^:]+(:[0-9a-f]+){2}", header["model"]):
        raise SnapshotError(f"{path}: its header names a model {header['model'][:80]!r}, expected a fingerprint")


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header's values and of names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256("\0".join(header[key] for key in _KEYS).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dtype(snapshot: Snapshot) -> str:
    return str(snapshot.dtype).removeprefix("torch.")
