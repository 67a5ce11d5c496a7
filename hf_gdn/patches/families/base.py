"""The base class of model families. A family describes how its layers differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor
from transformers.activations import ACT2FN

from ...kernels.contract import ACTIVATIONS, LayerSpec, Projections, Weights
from ...upstream import modules


class Dims(NamedTuple):
    """Number of heads of q/k and of v, and their dimensions."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int


# Features of patched families and the tests that cover them. docs/models.md is generated from this.
MTP = "MTP"
FEATURES = {
    "padding, left and right": "tests/patches/test_padding.py",
    "padding inside a row": "tests/patches/test_padding.py",
    "packed by bounds": "tests/patches/test_packing.py",
    "packed by `position_ids`": "tests/patches/test_packing.py",
    "cache continued": "tests/patches/test_padding.py",
    "beams, rows selected": "tests/caches/test_batch.py",
    "training": "tests/patches/test_models.py",
    "`torch.compile(fullgraph=True)`": "tests/patches/test_models.py",
    "CUDA graphs": "tests/test_graphs.py",
    "assistants, tokens rolled back": "tests/caches/test_rollback.py",
    MTP: "tests/drafting/test_mtp.py",
    "continuous batching": "tests/serving/test_families.py",
}


def has_hooks(module: Any) -> bool:
    """Whether a module has hooks (FSDP and users add them), so it has to be called instead of read."""
    return modules.has_hooks(module)


def _must_call_norm(norm: Any) -> bool:
    """Whether a gated norm has to be called: it has hooks, or is not transformers' own (PEFT wraps it)."""
    return has_hooks(norm) or not hasattr(norm, "variance_epsilon")


def _known(activation: str) -> Any:
    """The value of `LayerSpec` for an activation, by transformers' name."""
    return activation if activation in ACTIVATIONS else ACT2FN[activation]


class Family(ABC):
    """Describes one class of layers. Instances are stateless.

    Attributes:
        name: transformers' model type, which users pass to `hf_gdn.patch`.
        class_name: name of the layer class.
        model_name: name of the text model's class, whose forward calls the decoder layers.
        variant: ``"gdn"`` (one decay per head) or ``"kda"`` (one per channel).
        about: what distinguishes it, in a few words, for the docs.
        cannot: keys of `FEATURES` that it does not support, each with the reason.
        masks_always: the model passes its layers a mask of ones if there is no padding, even for single tokens.
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
        """Name of the module that defines the layer class."""
        return f"transformers.models.{self.name}.modeling_{self.name}"

    @property
    def direct(self) -> tuple[str, ...]:
        return ("conv1d", self.norm_name)

    def dims(self, layer: Any) -> Dims:
        """Heads and dimensions of a layer."""
        return Dims(layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)

    def dims_of_config(self, config: Any) -> Dims:
        """Heads and dimensions of the layers of a text model's config."""
        if self.variant == "kda":
            return Dims(*[config.linear_num_heads] * 2, *[config.linear_head_dim] * 2)
        return Dims(
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )

    @abstractmethod
    def project(self, layer: Any, x: Tensor) -> Projections:
        """Run the layer's input projections on x ``[B, T, hidden]``."""

    def decays(self, layer: Any) -> Any:
        """The module that has A_log and dt_bias."""
        return layer

    def spec(self, layer: Any) -> LayerSpec:
        """The options of the layer's gates and norm."""
        norm = getattr(layer, self.norm_name)
        return LayerSpec(
            activation=_known(layer.activation),
            gate=_known(getattr(norm, "activation", "silu")),
            eps=getattr(norm, "variance_epsilon", 0.0),
        )

    def split(
        self, layer: Any, qkv: Tensor | tuple[Tensor, Tensor, Tensor], a: Tensor, b: Tensor, z: Tensor
    ) -> Projections:
        """Build `Projections` from outputs ``[B, T, heads dim]``: qkv in one tensor or three, and a, b and z."""
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
        """The layer's parameters between its projections; norm is None if the norm module has to be called.

        Kernels read contiguous ones; a parameter that a checkpoint keeps in another order is copied.
        """
        conv, decays, norm = layer.conv1d, self.decays(layer), getattr(layer, self.norm_name)
        return Weights(
            conv.weight.squeeze(1).contiguous(),
            None if conv.bias is None else conv.bias.contiguous(),
            decays.A_log.contiguous(),
            decays.dt_bias.contiguous(),
            None if _must_call_norm(norm) else norm.weight.contiguous(),
        )
