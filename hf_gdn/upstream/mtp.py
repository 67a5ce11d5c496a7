"""What multi-token prediction takes from transformers: the layer, its config, and a checkpoint's tensors."""

from __future__ import annotations

import copy
import importlib
import os
import re
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from . import seams

NAMES = re.compile(r"^mtp\.")
FULL_ATTENTION = "full_attention"


def layer_class() -> Any:
    """transformers' layer of such heads. Raises PatchError where it has none."""
    return seams.class_of("transformers.modeling_layers", "MtpLayer")


def head_config(config: Any, experts: bool) -> Any:
    """The config of a head: one full-attention layer, whose MLP is a mixture of experts or dense."""
    found = copy.deepcopy(config.get_text_config(decoder=True))
    found.num_hidden_layers, found.layer_types = 1, [FULL_ATTENTION]
    if hasattr(found, "mlp_only_layers"):
        found.mlp_only_layers, found.decoder_sparse_step = ([] if experts else [0]), 1
    return found


def make_layer(model: Any, config: Any) -> nn.Module:
    """The head's layer for a model, without weights (on the device ``meta``)."""
    decoder = model.get_decoder()
    with torch.device("meta"):
        return layer_class()(config, type(decoder.layers[-1]), type(decoder.norm), 0)


def last_hidden_states(*, all_of_them: bool = False) -> dict[str, Any]:
    """Arguments of a forward whose outputs then have ``hidden_states``, the last of them after the final norm."""
    only_one = hasattr(importlib.import_module("transformers.utils.output_capturing"), "selected_hidden_states")
    return {"output_hidden_states": -1 if only_one and not all_of_them else True}


def end_tokens(generation_config: Any) -> Tensor | None:
    """The tokens that end a text in a call of ``generate``."""
    return getattr(generation_config, "_eos_token_tensor", None)


def checkpoint_names(model: Any) -> dict[str, str]:
    """Names of the tensors ``mtp.*`` of the checkpoint that a model was loaded from -> their files; none without one.

    Raises:
        OSError: the checkpoint is not there any more, or a file of it cannot be read.
    """
    where = model.config.name_or_path
    if not where:
        return {}
    resolve = seams.class_of("transformers.modeling_utils", "_get_resolved_checkpoint_files")
    given = {"variant": None, "gguf_file": None, "use_safetensors": True, "user_agent": None, "is_remote_code": False}
    files, index = resolve(pretrained_model_name_or_path=where, **given)
    if index is not None:
        held = {name for key, name in index["weight_map"].items() if NAMES.match(key)}
        files = [file for file in files if os.path.basename(file) in held]
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found.update({name: file for name in opened.keys() if NAMES.match(name)})  # noqa: SIM118
    return found


def checkpoint_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors ``mtp.*`` themselves, on the CPU."""
    names, found = checkpoint_names(model), {}
    for file in set(names.values()):
        with safe_open(file, "pt") as opened:
            found.update({name: opened.get_tensor(name) for name, place in names.items() if place == file})
    return found
