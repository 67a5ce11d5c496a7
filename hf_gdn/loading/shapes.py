"""Released models by name: their configs where they are not transformers' defaults, and their layers' dimensions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..registry import Request

ASSETS = Path(__file__).parent / "assets"

# Released models by the name --config knows them by: model type, and their own config.json's values where they are not
# the defaults of transformers' config classes.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next-80b": (
        "qwen3_next",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
            "max_position_embeddings": 262144,
            "intermediate_size": 5120,
        },
    ),
    "kimi_linear-48b": (
        "kimi_linear",
        {
            "layer_types": [
                "full_attention" if i in (4, 8, 12, 16, 20, 24, 27) else "linear_attention" for i in range(1, 28)
            ]
        },
    ),
}


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model's linear-attention layers.

    Args:
        model_type: the family in transformers.
        variant: ``"gdn"`` or ``"kda"``.
        k_heads, v_heads: heads of q and k; of v, gates and state.
        k_dim, v_dim: K and V of a head.
        part: how many processes share a layer (tensor parallelism); the dimensions are those of one.
    """

    model_type: str
    variant: str
    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    part: int = 1

    @property
    def ops(self) -> tuple[str, str]:
        """The chunked and the recurrent op."""
        return f"chunk_{self.variant}", f"recurrent_{self.variant}"

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of an op's ``make_inputs``."""
        return dict(HK=self.k_heads, HV=self.v_heads, K=self.k_dim, V=self.v_dim)

    def request(self, op: str, device: torch.device, dtype: torch.dtype) -> Request:
        """What the registry is asked."""
        return Request(op, device.type, dtype, self.k_heads, self.v_heads, self.k_dim, self.v_dim)


def _read(path: Path) -> Shape:
    config = json.loads(path.read_text(encoding="utf-8"))
    if "linear_num_heads" in config:
        heads, dim = config["linear_num_heads"], config["linear_head_dim"]
        return Shape(config["model_type"], "kda", heads, heads, dim, dim)
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    return Shape(config["model_type"], "gdn", *(config[name] for name in names))


def embedded() -> list[str]:
    """Names of the two tiny trained models that come with the package."""
    return sorted(path.name for path in ASSETS.iterdir() if (path / "config.json").is_file())


# Released models, with the defaults of transformers' config classes, and the embedded ones.
SHAPES = {
    "qwen3_next-80b": Shape("qwen3_next", "gdn", 16, 32, 128, 128),
    "kimi_linear-48b": Shape("kimi_linear", "kda", 32, 32, 128, 128),
    "qwen3_5_moe-35b": Shape("qwen3_5_moe", "gdn", 16, 32, 128, 128),
    # What each of eight processes has of them.
    "qwen3_next-80b-tp8": Shape("qwen3_next", "gdn", 2, 4, 128, 128, part=8),
    "kimi_linear-48b-tp8": Shape("kimi_linear", "kda", 4, 4, 128, 128, part=8),
    "olmo_hybrid": Shape("olmo_hybrid", "gdn", 30, 30, 96, 192),
    **{name: _read(ASSETS / name / "config.json") for name in embedded()},
}
# The larger released models of either rule, which figures and tables are about where nothing else is asked for.
LARGE = ("qwen3_next-80b", "kimi_linear-48b")
