"""Lara-Mini: the layers of Qwen3.5 with the output norm in fp32; other layers are full or sliding-window attention."""

from __future__ import annotations

from typing import Any

from ...kernels.contract import LayerSpec
from .qwen3_5 import Qwen3_5


class LaraMini(Qwen3_5):
    """Its checkpoints fuse the input projections; transformers splits them on loading."""

    name = "lara_mini"
    class_name = "LaraMiniGatedDeltaNet"
    model_name = "LaraMiniModel"
    about = "sliding-window attention beside it"
    cannot = (
        ("padding inside a row", "its sliding windows count padding"),
        ("CUDA graphs", "its sliding-window layers count tokens in Python, which a replay does not run"),
        ("MTP", "its checkpoints have no such head"),
    )

    def spec(self, layer: Any) -> LayerSpec:
        return super().spec(layer)._replace(norm_in_fp32=True)


FAMILY = LaraMini()
