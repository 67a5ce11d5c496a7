"""Qwen3.5-MoE: the layers of Qwen3.5."""

from __future__ import annotations

from .qwen3_5 import Qwen3_5


class Qwen3_5Moe(Qwen3_5):
    """Its layer class has another name and the same layout."""

    name = "qwen3_5_moe"
    class_name = "Qwen3_5MoeGatedDeltaNet"
    model_name = "Qwen3_5MoeTextModel"


FAMILY = Qwen3_5Moe()
