"""Which model a snapshot belongs to: a fingerprint of what decides the meaning of a cache's numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...upstream import modules, tensors

SAMPLES = 32  # values read of every parameter
# What a config says about loading, generating and training; the cache's numbers do not depend on it.
_IGNORED = {
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def fingerprint(model: nn.Module) -> str:
    """A model's name for snapshots: ``"<model type>:<hash of its config>:<hash of some of its weights>"``.

    The config is the text model's, where it differs from its class's defaults, without what concerns loading,
    generating and training only. Of the weights, names, shapes, dtypes and 32 values of every parameter of the text
    model are read, with those of LoRA adapters: milliseconds, whatever the size. Fine-tunes of a model differ by it, so
    do its dtypes, its quantized forms, a model that accelerate keeps partly on disk or in host memory (whose values are
    not read) and, under tensor parallelism, its ranks. Not seen: edits of a few values, adapters that are switched off,
    a vision tower.

    Args:
        model: a transformers model, bare or wrapped (PEFT, `torch.compile`).

    Example:
        >>> from hf_gdn.caches import fingerprint
        >>> fingerprint(model).partition(":")[0]
        'qwen3_next'
    """
    decoder = _decoder(model)
    config = decoder.config.get_text_config(decoder=True)
    defaults = type(config)().to_dict()
    told = {
        key: value
        for key, value in config.to_dict().items()
        if key not in _IGNORED and not key.startswith("_") and (key not in defaults or defaults[key] != value)
    }
    text = json.dumps(told, sort_keys=True, default=str)
    weights = hashlib.sha256()
    for name, parameter in sorted(decoder.named_parameters()):
        for tensor in _plain(parameter.detach()):
            weights.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            weights.update(_sample(tensor))
    return f"{config.model_type}:{hashlib.sha256(text.encode()).hexdigest()[:16]}:{weights.hexdigest()[:32]}"


def differences(theirs: str, ours: str) -> str:
    """What sets the model of a snapshot apart from another one, in words."""
    (a, config, *_), (b, our_config, *_) = (*theirs.split(":"), ""), (*ours.split(":"), "")
    if a != b:
        return f"it is of a {a} model, this is a {b} model"
    return f"it is of a {a} model with {'another config' if config != our_config else 'other weights'}"


def layer_devices(model: nn.Module, layers: int) -> list[torch.device | None]:
    """The device on which each layer of a model runs; None where its modules do not tell."""
    devices: list[torch.device | None] = [None] * layers
    for module in _decoder(model).modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and 0 <= index < layers and devices[index] is None:
            devices[index] = _runs_on(module)
    return devices


def _decoder(model: Any) -> Any:
    """The text model, whose layers fill the cache."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _runs_on(module: nn.Module) -> torch.device | None:
    for part in module.modules():
        offloaded = getattr(modules.accelerate_hook(part), "execution_device", None)
        if offloaded is not None:
            return torch.device(offloaded)
    return next((parameter.device for parameter in module.parameters() if parameter.device.type != "meta"), None)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a parameter is made of: a rank's shard, a quantized weight's parts, or itself."""
    local = getattr(tensor, "to_local", None)
    if local is not None:
        yield from _plain(local())
    elif tensors.parts(tensor):
        for part in tensors.parts(tensor):
            yield from _plain(part)
    else:
        yield tensor


def _sample(tensor: Tensor) -> bytes:
    """Bytes of some values, spread over the tensor; none where there are none to read."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return b""
    places = torch.linspace(0, tensor.numel() - 1, min(SAMPLES, tensor.numel()), dtype=torch.float64).long()
    if tensor.dim():
        tensor = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # indexing lacks float8
        tensor = tensor[torch.unravel_index(places.to(tensor.device), tensor.shape)]
    return tensor.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes()
