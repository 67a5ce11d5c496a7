"""hf_gdn's functions for Hugging Face's ``kernels`` package, from the installed package instead of a hub.

transformers makes layers of the functions that its gated-delta-rule layers call, and ``kernels`` gives these layers
another forward. A mapping names, for every layer and device, something with ``load()`` that returns a class with this
forward; `Layer` is that. Classes of transformers stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, registry
from .kernels.contract import ACTIVATIONS, LayerSpec
from .operators import call_norm
from .upstream import hub_kernels as upstream

# The signatures of the forwards are those of transformers' functions; ``kernels`` compares them.


def _chunk(name: str, backend: str) -> Callable[..., Any]:
    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if any(kwargs.get(packed) is not None for packed in ("cu_seqlens", "cu_seq_lens_q")):
            raise ValueError(
                f"{name}() got packed sequences, which the layer's convolution before it does not keep apart; "
                "hf_gdn.patch() serves them"
            )
        return getattr(ops, name)(  # as in transformers, other keywords have no effect
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            allow_neg_eigval=upstream.writes_twice(self),  # beta is given: this only says how large it may be
            backend=backend,
        )

    return forward


def _recurrent(name: str, backend: str) -> Callable[..., Any]:
    call = _chunk(name, backend)

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        output_final_state: bool,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        options = dict(initial_state=initial_state, output_final_state=output_final_state)
        return call(
            self, query, key, value, g, beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **options, **kwargs
        )

    return forward


def _gated_norm(name: str, backend: str) -> Callable[..., Any]:
    asked = registry.DEFAULT_BACKEND if backend == "auto" else backend

    def forward(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
        if self.activation not in ACTIVATIONS:
            return type(self).forward(self, hidden_states, gate)  # the original
        V = hidden_states.shape[-1]
        o = hidden_states.reshape(1, -1, 1, V)
        z = gate.to(hidden_states.dtype).contiguous().reshape(1, -1, 1, 1, V)
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (o, z, self.weight))
        kind = "gated_norm", o.device.type, o.dtype, (1, 1, V, V), asked, needs_grad
        if asked == "auto":
            kernel = registry.resolve_cached(*kind)
        else:  # not every backend has a norm
            kernel = registry.companion(*kind) or registry.get("gated_norm", "eager")
        spec = LayerSpec(gate=self.activation, norm_in_fp32=True, eps=self.variance_epsilon)
        return call_norm(kernel, o, z, self.weight.contiguous(), spec, backend, needs_grad).view(hidden_states.shape)

    return forward


_FORWARDS = {
    "chunk_gated_delta_rule": _chunk,
    "fused_recurrent_gated_delta_rule": _recurrent,
    "chunk_kda": _chunk,
    "fused_recurrent_kda": _recurrent,
    "RMSNormGated": _gated_norm,
}


@dataclass(frozen=True)
class Layer:
    """What ``kernels`` calls a repository: one function of hf_gdn as a stateless layer.

    Args:
        name: the name under which transformers lets it be replaced.
        backend: the backend that serves it.
    """

    name: str
    backend: str

    def load(self) -> type[nn.Module]:
        forward = _FORWARDS[self.name](self.name, self.backend)
        return type(self.name, (nn.Module,), dict(forward=forward, can_torch_compile=True, has_backward=True))

    def __str__(self) -> str:
        return f"`hf_gdn` (layer `{self.name}`, backend {self.backend})"


def kernel_mapping(backend: str = "auto") -> dict[str, dict[Any, Layer]]:
    """hf_gdn's functions for ``kernels.register_kernel_mapping`` and ``kernels.use_kernel_mapping``.

    Models that are loaded with ``use_kernels=True`` afterwards, with or without a `KernelConfig` that inherits the
    registered mapping, run the delta rule and the gated norm of hf_gdn, on CPUs and on CUDA and ROCm GPUs, for
    inference, training and ``torch.compile``. They take precedence over transformers' own entries for the hub, in any
    order of registration. docs/ecosystem.md says what `hf_gdn.patch` does beyond.

    Args:
        backend: a backend's name, or ``"auto"``.

    Returns:
        the mapping: name of a layer -> device -> `Layer`.

    Raises:
        PatchError: the installed transformers does not take the installed ``kernels``, or none is installed.
        ValueError: unknown backend. The models' calls raise it for packed sequences.

    Examples:
        >>> from kernels import register_kernel_mapping
        >>> register_kernel_mapping(hf_gdn.kernel_mapping())
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-Next-80B-A3B-Instruct", use_kernels=True)
    """
    registry.check_backend(backend)
    upstream.check()
    from kernels import CUDAProperties, Device

    # transformers registers its kernels for all CUDA devices whenever a model is loaded, and the narrowest range wins.
    cuda = Device("cuda", CUDAProperties(min_capability=0, max_capability=sys.maxsize - 1))
    return {name: dict.fromkeys(("cpu", cuda, "rocm"), Layer(name, backend)) for name in _FORWARDS}
