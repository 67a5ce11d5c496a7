"""Fingerprint of the model that filled a cache, so that a snapshot is not used with another model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...upstream import modules, tensors

SAMPLES = 32  # values read from every parameter
# Config fields about loading, generating and training, which do not affect the contents of a cache.
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
    """Identify a model for snapshots: ``"<model type>:<hash of its config>:<hash of some of its weights>"``.

    The config hash covers all values of the text model's config that differ from the defaults of its class, except
    those that concern only loading, generating and training. The weight hash covers name, shape, dtype and 32 values of
    every parameter of the text model, including LoRA adapters; this takes milliseconds for any size. The fingerprint
    differs between fine-tunes, dtypes and quantizations of a model, between ranks under tensor parallelism, and if
    accelerate offloads parts of the model, whose values are not read. It does not detect edits of a few values,
    disabled adapters, or a different vision tower.

    Args:
        model: a transformers model, bare or wrapped (PEFT, `torch.compile`).

    Examples:
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
    """Describe how the model of a snapshot differs from the model in use."""
    (a, config, *_), (b, our_config, *_) = (*theirs.split(":"), ""), (*ours.split(":"), "")
    if a != b:
        return f"it is of a {a} model, this is a {b} model"
    return f"it is of a {a} model with {'another config' if config != our_config else 'other weights'}"


def layer_devices(model: nn.Module, layers: int) -> list[torch.device | None]:
    """The device on which each layer of a model runs; None if it cannot be determined."""
    devices: list[torch.device | None] = [None] * layers
    for module in _decoder(model).modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and 0 <= index < layers and devices[index] is None:
            devices[index] = modules.runs_on(module)
    return devices


def _decoder(model: Any) -> Any:
    """The text model; its layers fill the cache."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors of a parameter: a rank's shard, the parts of a quantized weight, or the parameter itself."""
    local = getattr(tensor, "to_local", None)
    if local is not None:
        yield from _plain(local())
    elif tensors.parts(tensor):
        for part in tensors.parts(tensor):
            yield from _plain(part)
    else:
        yield tensor


def _sample(tensor: Tensor) -> bytes:
    """Bytes of up to `SAMPLES` values, spread evenly over the tensor; empty for meta and empty tensors."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return b""
    places = torch.linspace(0, tensor.numel() - 1, min(SAMPLES, tensor.numel()), dtype=torch.float64).long()
    if tensor.dim():
        tensor = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # float8 cannot be indexed
        tensor = tensor[torch.unravel_index(places.to(tensor.device), tensor.shape)]
    return tensor.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes()
