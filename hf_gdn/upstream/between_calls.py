"""What models with vision keep between calls besides a cache, and which tokens stand for what they see."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# Attribute of a module: the offset of text positions after the images of the last prompt, whosever prompt it was.
_OFFSETS = "rope_deltas"
# Fields of configs: tokens whose embeddings are replaced with those of an image, a video or a sound.
_PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")


def forget_positions(model: nn.Module) -> None:
    """Forget the position offset of the last prompt; a new model has none. The next prompt computes its own."""
    for module in model.modules():
        if vars(module).get(_OFFSETS) is not None:
            setattr(module, _OFFSETS, None)


def placeholders(config: Any) -> list[int]:
    """Token ids that stand for images, videos and sounds."""
    found = [getattr(config, name, None) for name in _PLACEHOLDERS]
    return [token for token in found if token is not None]


def is_placeholder(input_ids: Tensor, config: Any) -> Tensor:
    """Which of `input_ids` stand for images, videos or sounds, a boolean tensor of the same shape."""
    found = input_ids.new_zeros(input_ids.shape, dtype=bool)  # type: ignore[call-overload]
    for token in placeholders(config):
        found |= input_ids == token
    return found
