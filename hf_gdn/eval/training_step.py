"""Copies of a model that are trained, the two ways they run, and their gradients."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..loading.models import Loaded
from ..patches import patched, unpatched
from ..upstream.modules import checkpointing_enable
from .options import TrainOptions
from .training_batches import Inputs, packed, padded


@dataclass(frozen=True)
class Way:
    """How a side runs: the context of its forward and backward, and how it reads documents."""

    scope: Callable[[], AbstractContextManager[Any]]
    arrange: Callable[[Sequence[Tensor], torch.device], Inputs]


def ways(loaded: Loaded, options: TrainOptions, backend: str) -> dict[str, Way]:
    """By side. Padding is the original's only right way to read several documents."""
    return {
        "original": Way(unpatched, padded),
        "patched": Way(
            lambda: patched(loaded.families, backend=backend, strict=True), packed if options.packed else padded
        ),
    }


class Copy:
    """A copy of the model and its optimizer.

    Args:
        model: the copy.
        lr: learning rate of AdamW.

    Attributes:
        trained: the parameters that are trained, by name.
    """

    def __init__(self, model: Any, lr: float) -> None:
        self.model = model
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(self.trained.values(), lr, weight_decay=0.0)

    def backward(self, way: Way, documents: Sequence[Tensor], count: int, seed: int) -> Tensor:
        """Add gradients of the loss of documents, summed and divided by `count`. Returns the loss."""
        inputs = way.arrange(documents, self.model.device)
        torch.manual_seed(seed)  # of dropout, where a model has it
        self.model.train()
        logits = self.model(**inputs.arguments, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), inputs.labels.flatten(), reduction="sum") / count
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        """By parameter; zeros for one that had no part in the loss."""
        for p in self.trained.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return {name: p.grad for name, p in self.trained.items() if p.grad is not None}

    def update(self) -> None:
        """Take a step, and drop the gradients."""
        self._optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Free them."""
        self._optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, ``NAME.NUMBER OF THE PARAMETER`` each."""
        found = {f"weight.{at}": p.detach() for at, p in enumerate(self.trained.values())}
        for at, moments in self._optimizer.state_dict()["state"].items():
            found |= {f"{name}.{at}": value for name, value in moments.items()}
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a `state`."""
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, number = key.rpartition(".")
            moments.setdefault(int(number), {})[name] = value
        with torch.no_grad():
            for at, p in enumerate(self.trained.values()):
                p.copy_(moments[at].pop("weight"))
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


def copies(loaded: Loaded, options: TrainOptions) -> dict[str, Copy]:
    """By side; they share what is not trained. The loaded model becomes the patched side's."""
    model = loaded.model
    if options.lora is not None:
        peft = import_peft()
        torch.manual_seed(options.seed)
        model = peft.get_peft_model(model, peft.LoraConfig(r=options.lora, target_modules="all-linear"))
    if options.checkpointing:
        checkpointing_enable(model, {"use_reentrant": False})
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return {"original": Copy(copy.deepcopy(model, shared), options.lr), "patched": Copy(model, options.lr)}


def import_peft() -> Any:
    """PEFT. Raises UserError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError("--lora needs the peft package: pip install peft") from error
    return peft


def group_of(name: str) -> str:
    """A parameter's name without the numbers of layers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix("base_model.model."))


def norms(gradients: dict[str, Tensor]) -> dict[str, float]:
    """Frobenius norm of each group of parameters."""
    squares: dict[str, float] = {}
    for name, gradient in gradients.items():
        square = torch.linalg.vector_norm(gradient, dtype=torch.float64).item() ** 2
        squares[group_of(name)] = squares.get(group_of(name), 0.0) + square
    return {group: math.sqrt(square) for group, square in squares.items()}
