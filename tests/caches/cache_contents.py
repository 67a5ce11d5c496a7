"""What a cache holds, down to the bit, for tests that say that nothing changed."""

from __future__ import annotations

import torch


def tensors(cache) -> dict[str, torch.Tensor]:
    """All tensors of a cache by name."""
    found = {}
    for index, layer in enumerate(cache.layers):
        for name, value in vars(layer).items():
            for key, part in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(part, torch.Tensor):
                    found[f"{index}.{name}.{key}"] = part
    return found


def everything(cache) -> dict:
    """All attributes of all layers; tensors as shape, dtype and bytes."""
    found = {name: raw(tensor) for name, tensor in tensors(cache).items()}
    for index, layer in enumerate(cache.layers):
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                value = {key: part for key, part in value.items() if not isinstance(part, torch.Tensor)}
            if not isinstance(value, torch.Tensor):
                found[f"{index}.{name}"] = value
    return found


def raw(tensor: torch.Tensor) -> tuple:
    data = tensor.detach().contiguous().reshape(-1)
    return tensor.shape, tensor.dtype, data.view(torch.uint8).numpy().tobytes() if data.numel() else b""


def parts(snapshot) -> dict[str, tuple]:
    """All parts of a snapshot, as shape, dtype and bytes."""
    return {f"{i}.{name}": raw(part) for i, held in enumerate(snapshot.layers) for name, part in held.items()}


def memory(found) -> set[int]:
    """Addresses of the memory of tensors."""
    return {tensor.untyped_storage().data_ptr() for tensor in found if tensor.numel()}
