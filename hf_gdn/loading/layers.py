"""Linear-attention layers of models by name: one at full width with random weights, or only its dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..patches import all_families
from ..patches.families.base import Dims, Family
from ..upstream.seams import layer_class
from .models import Source, read_config
from .shapes import CONFIGS, SHAPES, embedded


def default_config(family: str) -> Any:
    """The config of a family with the defaults of transformers' config class."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family)


def kind_of_config(family: Family, config: Any) -> tuple[Dims, float]:
    """Heads and dimensions of a text model's layers, and their largest beta, from its config. Allocates nothing."""
    cls = layer_class(family.module, family.class_name)
    with torch.device("meta"):
        layer = cls(config, list(config.layer_types).index("linear_attention"))
    return family.dims(layer), family.spec(layer).beta_scale


def make_layer(name: str, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A layer of a shape of `SHAPES` and the config of its text model.

    Raises:
        UserError: the shape is one process's part of a layer; PatchError: transformers has no such model.
    """
    shape = SHAPES[name]
    if shape.part > 1:
        whole = ", ".join(known for known, other in SHAPES.items() if other.part == 1)
        raise UserError(f"--shape {name} is a part of a layer; whole layers: {whole}")
    family = all_families()[shape.model_type]
    cls = layer_class(family.module, family.class_name)
    if name in CONFIGS or name in embedded():
        config = read_config(Source(name, random=True))
    else:
        config = default_config(shape.model_type)
    config = config.get_text_config()
    torch.manual_seed(0)
    layer = cls(config, config.layer_types.index("linear_attention"))
    for key, parameter in layer.named_parameters():  # the model around it would do this
        if key.endswith("A_log"):
            parameter.data.uniform_(1, 16).log_()
        elif key.endswith("dt_bias"):
            parameter.data.fill_(1.0)
    return layer.to(device, dtype).eval(), config
