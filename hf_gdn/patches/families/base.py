"""What is particular to a family of layers, and the base that family files fill in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor
from transformers.activations import ACT2FN

from ...kernels.contract import ACTIVATIONS, LayerSpec, Projections, Weights
from ...upstream import modules


class Dims(NamedTuple):
    """Heads of q/k and of v, and their dimensions."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int


# What a patched family can do beyond running faster, and the tests that show it; docs/models.md is made of this.
FEATURES = {
    "padding anywhere": "tests/patches/test_padding.py",
    "packed by bounds": "tests/patches/test_packing.py",
    "packed by `position_ids`": "tests/patches/test_packing.py",
    "cache continued": "tests/patches/test_padding.py",
    "beams, rows selected": "tests/caches/test_batch.py",
    "training": "tests/patches/test_models.py",
    "`torch.compile(fullgraph=True)`": "tests/patches/test_models.py",
    "CUDA graphs": "tests/test_graphs.py",
    "assistants, tokens rolled back": "tests/caches/test_rollback.py",
}


def has_forward_hooks(module: Any) -> bool:
    """Whether a module has to be called, its parameters not read: it has forward hooks, as FSDP and users add them."""
    return modules.has_forward_hooks(module)


def _must_call_norm(norm: Any) -> bool:
    """The same of a gated norm, which may also be another one than transformers' (PEFT wraps it)."""
    return has_forward_hooks(norm) or not hasattr(norm, "variance_epsilon")


def _known(activation: str) -> Any:
    """An activation as a `LayerSpec` has it, by transformers' name."""
    return activation if activation in ACTIVATIONS else ACT2FN[activation]


class Family(ABC):
    """What is particular to one class of layers. Instances are stateless.

    Attributes:
        name: transformers' model type, the name users give.
        class_name: name of the layer class.
        model_name: name of the text model's class, whose forward calls the decoder layers.
        variant: ``"gdn"`` (one decay per head) or ``"kda"`` (one per channel).
        about: what is particular to it in a few words, for the docs.
        cannot: features of `FEATURES` that it does not have, each with the reason.
        masks_always: the model hands its layers a mask of ones where there is no padding, single tokens included.
        norm_name, output_name: names of the output norm and the output projection in a layer.
        direct: children whose parameters are read without calling them; accelerate's offload hooks are fired for these.
    """

    name: str
    class_name: str
    model_name: str
    variant: str
    about: str
    cannot: tuple[tuple[str, str], ...] = ()
    masks_always: bool = False
    norm_name: str = "norm"
    output_name: str = "out_proj"

    @property
    def module(self) -> str:
        """Name of the module that has the layer class."""
        return f"transformers.models.{self.name}.modeling_{self.name}"

    @property
    def direct(self) -> tuple[str, ...]:
        return ("conv1d", self.norm_name)

    def dims(self, layer: Any) -> Dims:
        """Heads and dimensions of a layer."""
        return Dims(layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)

    @abstractmethod
    def project(self, layer: Any, x: Tensor) -> Projections:
        """Run the layer's input projections on ``[B, T, hidden]``."""

    def decays(self, layer: Any) -> Any:
        """The module that has A_log and dt_bias."""
        return layer

    def spec(self, layer: Any) -> LayerSpec:
        """How the layer's gates and norm are made."""
        norm = getattr(layer, self.norm_name)
        return LayerSpec(
            activation=_known(layer.activation),
            gate=_known(getattr(norm, "activation", "silu")),
            eps=getattr(norm, "variance_epsilon", 0.0),
        )

    def split(
        self, layer: Any, qkv: Tensor | tuple[Tensor, Tensor, Tensor], a: Tensor, b: Tensor, z: Tensor
    ) -> Projections:
        """`Projections` of outputs ``[B, T, heads dim]``: qkv in one tensor or three; a, b and z apart."""
        k_heads, v_heads, k_dim, v_dim = self.dims(layer)
        group = v_heads // k_heads
        joined = qkv if isinstance(qkv, Tensor) else None
        sizes = (k_heads * k_dim, k_heads * k_dim, v_heads * v_dim)
        q, k, v = qkv if joined is None else joined.split_with_sizes(sizes, -1)
        return Projections(
            q.unflatten(2, (k_heads, k_dim)),
            k.unflatten(2, (k_heads, k_dim)),
            v.unflatten(2, (k_heads, group, v_dim)),
            a.unflatten(2, (k_heads, group)) if self.variant == "gdn" else a,
            b.unflatten(2, (k_heads, group)),
            z.unflatten(2, (k_heads, group, v_dim)),
            joined,
        )

    def weights(self, layer: Any) -> Weights:
        """The layer's other parameters."""
        conv, decays, norm = layer.conv1d, self.decays(layer), getattr(layer, self.norm_name)
        weight = None if _must_call_norm(norm) else norm.weight
        return Weights(conv.weight.squeeze(1), conv.bias, decays.A_log, decays.dt_bias, weight)
