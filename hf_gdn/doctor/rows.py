"""What is examined: each op on each backend, in each dtype, for the heads and dimensions of models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import registry
from ..errors import UserError
from ..loading.layers import default_config, kind_of_config
from ..loading.models import Source, read_config
from ..patches import all_families
from ..registry import Dims, Request
from ..upstream import seams

_RULES = ("chunk", "backward", "recurrent")  # the ops that are asked for a model's largest beta
_KINDS = ("step", "prologue", "backward_prologue")
_NORMS = ("gated_norm", "backward_gated_norm")


@dataclass(frozen=True)
class Row:
    """A kernel for one kind of call.

    Attributes:
        op, backend: the kernel.
        dtype: of the model, without ``"torch."``.
        dims: HK, HV, K and V.
        models: families or models that have such layers.
        device: where it runs.
        beta_max: the largest beta of these layers.
    """

    op: str
    backend: str
    dtype: str
    dims: Dims
    models: tuple[str, ...]
    device: str
    beta_max: float = 1.0

    @property
    def request(self) -> Request:
        """What the registry is asked for such a call."""
        dtype = getattr(torch, self.dtype)
        return Request(self.op, torch.device(self.device).type, dtype, *self.dims, self.beta_max)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> Row:
        return cls(**{**found, "dims": tuple(found["dims"]), "models": tuple(found["models"])})


def shapes(models: Iterable[str] = ()) -> dict[tuple[str, Dims, float], tuple[str, ...]]:
    """The models that have layers of a variant with these dimensions and this largest beta.

    Args:
        models: folders, hub names or names of embedded models; by default all families that transformers has here,
            with the dimensions of its config classes.

    Raises:
        UserError: a model cannot be read or has no layers of a known family.
    """
    families = all_families()
    if models:
        configs = [(name, read_config(Source(name, random=True))) for name in models]
    else:
        here = [name for name, family in families.items() if seams.has_module(family.module)]
        configs = [(name, default_config(name)) for name in here]
    found: dict[tuple[str, Dims, float], tuple[str, ...]] = {}
    for name, config in configs:
        text = config.get_text_config()
        family = next((f for f in families.values() if text.model_type in (f.name, f"{f.name}_text")), None)
        if family is None:
            raise UserError(f"--model {name} is a {text.model_type}; families: {', '.join(families)}")
        (k_heads, v_heads, k_dim, v_dim), beta_max = kind_of_config(family, text)
        key = family.variant, (k_heads, v_heads, k_dim, v_dim), beta_max
        found[key] = (*found.get(key, ()), name)
    return found


def rows(models: Iterable[str], dtypes: Iterable[str], device: str) -> list[Row]:
    """All rows, kernel by kernel. Raises UserError as `shapes`."""
    wanted: dict[tuple[str, str, str, Dims, float], tuple[str, ...]] = {}
    for (variant, dims, beta_max), names in shapes(models).items():
        norm_dims = (dims[1], dims[1], dims[3], dims[3])  # a norm does not depend on the keys
        calls = [(f"{kind}_{variant}", dims, beta_max) for kind in _RULES]
        calls += [(f"{kind}_{variant}", dims, 1.0) for kind in _KINDS] + [(op, norm_dims, 1.0) for op in _NORMS]
        for op, of_op, largest in calls:
            for kernel in registry.kernels(op):
                for dtype in dtypes:
                    key = op, kernel.backend, dtype, of_op, largest
                    wanted[key] = (*wanted.get(key, ()), *names)
    order = {kernel: number for number, kernel in enumerate((k.op, k.backend) for k in registry.kernels())}
    found = [Row(*key[:4], names, device, key[4]) for key, names in wanted.items()]
    return sorted(found, key=lambda row: order[row.op, row.backend])
