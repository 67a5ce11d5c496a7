"""Weights in int8 by torchao, in place: what the sides of a comparison then share."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UserError

KINDS = ("int8",)


def quantize(model: nn.Module, kind: str | None) -> None:
    """Quantize the weights of a model's Linear modules but its output embeddings; None does nothing.

    ``int8`` is torchao's weight-only kind: a scale for every row, activations in the model's own dtype.

    Raises:
        UserError: the kind is unknown, or torchao is not installed or does not fit this torch.
    """
    if kind is None:
        return
    if kind not in KINDS:
        raise UserError(f"--quantize {kind} is not known; kinds: {', '.join(KINDS)}")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(f"--quantize {kind} needs torchao: pip install torchao ({error})") from error
    outputs: Any = getattr(model, "get_output_embeddings", lambda: None)
    kept = outputs()
    quantize_(model, Int8WeightOnlyConfig(), lambda module, _: isinstance(module, nn.Linear) and module is not kept)
