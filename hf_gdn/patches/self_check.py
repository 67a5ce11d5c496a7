"""Compare a patched layer with the original, once, if transformers is newer than the tested range.

A new version may change what a layer computes without changing any name that the seams check. The first time a text
model of a patched family runs, a layer is built from the model's own config with random fp32 weights on the model's
device. Both forwards process the same tokens: six at once, then five and one through a cache. Padding and packed
sequences are not compared, because the original is wrong there (docs/differences.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import PatchError, named
from ..testing.compare import error as relative_error
from ..upstream import versions
from .families.base import Family
from .plan import Settings
from .swap import Swap

# Both forwards sum the same fp32 products in different orders, so they differ by at most 1e-6, or by 1e-3 if matrix
# products run in TF32 (2^-11 per factor). A layer that computes something else is off by at least 0.1, because weights
# are of order one.
BUDGET = 5e-3
_TOKENS, _HIDDEN = 6, 64

# Results by layer class, original forward and device type: the difference in words, None if there is none.
_found: dict[tuple[type, Any, str], str | None] = {}


class SelfCheck:
    """Compares a family's patched layer with the original when a text model first runs. Call it with the model.

    Args:
        family, settings, layer: the patched family, how it runs, and the swap of the layers' forward.
        give_up: called with the family's name and the reason if the two differ.
    """

    def __init__(self, family: Family, settings: Settings, layer: Swap, give_up: Callable[[str, str], None]) -> None:
        self.family, self.settings, self.layer, self.give_up = family, settings, layer, give_up

    def __call__(self, model: Any) -> bool:
        """Return whether the patched forward may be used. If not, `give_up` has been called.

        Raises:
            PatchError: the two differ and the settings are strict.
        """
        device = next(iter(model.parameters())).device
        device = torch.device("cpu") if device.type == "meta" else device  # offloaded weights
        key = self.layer.cls, self.layer.original, device.type
        if key not in _found:
            _found[key] = difference(self.family, self.layer, model.config, device)
        why = _found[key]
        if why is None:
            return True
        if self.settings.strict:
            raise PatchError(f"{self.family.name}: {why}")
        self.give_up(self.family.name, why)
        return False


def difference(family: Family, swap: Swap, config: Any, device: torch.device) -> str | None:
    """Describe how a family's patched layer differs from the original; None if it does not.

    Args:
        family: the family.
        swap: swap of the layer class's forward.
        config: config of the text model; the layer is built with a smaller hidden size.
        device: device to compare on.
    """
    try:
        layer = _layer(swap.cls, config, device)
        x = _random((2, _TOKENS, layer.hidden_size), 1.0).to(device)
        wanted, got = (_run(forward, layer, x, config) for forward in (swap.original, swap.replacement))
    except Exception as error:  # a new version may raise anything
        return f"a layer of {versions.installed()} could not be compared with the original: {named(error)}"
    for name, theirs in wanted.items():
        off = relative_error(got[name], theirs)
        if not off <= BUDGET:
            return (
                f"its patched layer differs from the original of {versions.installed()}: {name} off by {off:.1e}, "
                f"expected at most {BUDGET:.0e}"
            )
    return None


def _layer(cls: Any, config: Any, device: torch.device) -> Any:
    """Build a layer with random weights and few hidden channels; everything else follows the config."""
    config = copy.deepcopy(config)
    config.hidden_size = _HIDDEN
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        layer = cls(config, list(config.layer_types).index("linear_attention"))
    layer = layer.to(torch.float32).to_empty(device=device).eval()
    for seed, parameter in enumerate(layer.parameters()):
        centre = 0.5 if parameter.dim() == 1 else 0.0
        scale = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.data.copy_(_random(tuple(parameter.shape), scale, seed) + centre)
    for buffer in layer.buffers():
        buffer.zero_()
    return layer


def _random(shape: tuple[int, ...], scale: float, seed: int = 0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


@torch.no_grad()
def _run(forward: Callable[..., Tensor], layer: Any, x: Tensor, config: Any) -> dict[str, Tensor]:
    """Outputs and cached states of a forward. Arguments are positional, because their names differ by version."""
    cache = DynamicCache(config=config)
    first, last = x.split([_TOKENS - 1, 1], 1)
    outputs = {
        "the output of a prefill": forward(layer, x, None, None),
        "the output of a piece": forward(layer, first, cache, None),
        "the output of a decode step": forward(layer, last, cache, None),
    }
    states = cache.layers[layer.layer_idx]
    held = {"the convolution state": states.conv_states[0], "the recurrent state": states.recurrent_states[0]}
    return {**outputs, **held}
