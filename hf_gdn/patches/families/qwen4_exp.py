"""Qwen4-Exp: the layers of Qwen3.5, with a silu or a sigmoid gate on the output norm."""

from __future__ import annotations

from .qwen3_5 import Qwen3_5


class Qwen4Exp(Qwen3_5):
    """The norm defines the gate's activation. A layer may cache several convolution states; the first is this one's."""

    name = "qwen4_exp"
    class_name = "Qwen4ExpTextGatedDeltaNet"
    model_name = "Qwen4ExpTextModel"
    about = "silu or sigmoid output gate; text tower"
    cannot = (
        ("padding inside a row", "its n-gram embeddings read the tokens before, padding included"),
        ("packed by `position_ids`", "its full attention attends across sequence boundaries"),
        ("`torch.compile(fullgraph=True)`", "the indexer of its full attention branches on data"),
        ("CUDA graphs", "the indexer's positions grow from step to step"),
        ("continuous batching", "the paged cache of transformers does not know indexed attention"),
        ("MTP", "its head joins its two inputs by hyper-connections"),
    )


FAMILY = Qwen4Exp()
