"""What is trained on and held out: windows of a text, one document each or cut into several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..loading import texts
from .options import TrainOptions

HELD_OUT = 8  # windows
NOT_SCORED = -100  # label of tokens that have no loss


@dataclass(frozen=True)
class Inputs:
    """What a forward takes, and the labels ``[B, T]`` of its logits."""

    arguments: dict[str, Any]
    labels: Tensor


def padded(documents: Sequence[Tensor], device: torch.device) -> Inputs:
    """Documents as rows, padded on the right to the longest."""
    length = max(map(len, documents))
    ids = torch.stack([F.pad(document, (0, length - len(document))) for document in documents])
    real = torch.arange(length) < torch.tensor([len(document) for document in documents])[:, None]
    labels = F.pad(torch.where(real, ids, NOT_SCORED)[:, 1:], (0, 1), value=NOT_SCORED)
    arguments = {"input_ids": ids.to(device)}
    if not real.all():
        arguments["attention_mask"] = real.to(device, torch.int64)
    return Inputs(arguments, labels.to(device))


def packed(documents: Sequence[Tensor], device: torch.device) -> Inputs:
    """Documents one after the other in one row, told apart by positions that restart."""
    ids = torch.cat(list(documents))[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    labels = torch.where(positions == 0, NOT_SCORED, ids)
    labels = F.pad(labels[:, 1:], (0, 1), value=NOT_SCORED)
    return Inputs({"input_ids": ids.to(device), "position_ids": positions.to(device)}, labels.to(device))


@dataclass(frozen=True)
class Batches:
    """Windows to train on, a step each ``[steps, batch, context]``, and windows held out ``[N, context]``."""

    steps: Tensor
    held_out: Tensor
    cut: bool
    seed: int

    def documents(self, step: int, shard: int = 0, shards: int = 1) -> list[Tensor]:
        """The documents of a step's windows, of those that a process takes; at random lengths where they are cut."""
        windows = self.steps[step]
        found: list[Tensor] = []
        for row in range(shard, len(windows), shards):
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + 1009 * step + row)
            found += _cut(windows[row], generator) if self.cut else [windows[row]]
        return found


def _cut(window: Tensor, generator: torch.Generator) -> list[Tensor]:
    """A window in documents of an eighth of it to all of it."""
    least, cuts = max(2, len(window) // 8), [0]
    while len(window) - cuts[-1] >= 2 * least:
        length = int(torch.randint(least, len(window) + 1, (), generator=generator))
        if cuts[-1] + length > len(window) - least:
            break
        cuts.append(cuts[-1] + length)
    return [window[first:last] for first, last in pairwise([*cuts, len(window)])]


def scored(documents: Sequence[Tensor]) -> int:
    """How many tokens of documents have a loss."""
    return sum(len(document) - 1 for document in documents)


def of_text(ids: Tensor, source: str, options: TrainOptions) -> Batches:
    """Windows of a text's tokens ``[L]``: the last tenth, at least one window, is held out.

    Windows are drawn without replacement, and all again when there are no more.

    Raises:
        UserError: the text is too short for a window to train on and one held out.
    """
    context, wanted = options.context, options.steps * options.batch
    if len(ids) < 2 * context:
        raise UserError(
            f"text {source!r} has {len(ids)} tokens; training takes --context for a window and as many held out, "
            f"{2 * context}"
        )
    border = min(len(ids) - context, 9 * len(ids) // 10)
    held_out = texts.windows(ids[border:], context, limit=HELD_OUT, source=source).ids
    windows = texts.windows(ids[:border], context, source=source).ids
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(-(-wanted // len(windows)))])
    steps = windows[order[:wanted]].view(options.steps, options.batch, context)
    return Batches(steps, held_out, options.packed, options.seed)
