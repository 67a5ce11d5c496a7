"""What the tests of this folder share: logits, whose forward ran, and how far two trainings may be apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from hf_gdn import patches
from hf_gdn.testing.tolerances import GRADIENT
from tests import tiny_models as tiny

# One GDN and one KDA family, where a test is too slow for all.
TWO = ["qwen3_next", "kimi_linear"]


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@contextlib.contextmanager
def counting() -> Iterator[list]:
    """A list that grows by one for every layer that runs through hf_gdn."""
    calls: list = []
    classes = {c for f in patches.all_families().values() for c in type(f).__mro__ if "project" in c.__dict__}
    classes = {c for c in classes if not getattr(c.project, "__isabstractmethod__", False)}
    originals = {c: c.project for c in classes}

    def counted(project):
        return lambda self, layer, x: calls.append(layer) or project(self, layer, x)

    for c, project in originals.items():
        c.project = counted(project)
    try:
        yield calls
    finally:
        for c, project in originals.items():
            c.project = project


def runs_ours(model, ids) -> bool:
    """Whether every recurrent layer of a forward goes through hf_gdn (True) or none does (False)."""
    with counting() as calls:
        logits(model, ids)
    layers = {id(layer) for layer in calls}
    assert len(layers) in (0, len(tiny.mixers(model))), "some layers run hf_gdn and some do not"
    return bool(layers)


def assert_same_training(
    name: str, got: dict, wanted: dict, start: dict, steps: int, relative: float = GRADIENT
) -> None:
    """Parameters after some steps of SGD are the same.

    The gradients of the two are `relative` apart (in fp32 by GRADIENT), and so are the sums
    of them that SGD adds up; every step also rounds the parameters, half a unit in the last place: 2^-24 of each.
    """
    assert set(got) == set(wanted)
    moved = torch.cat([(wanted[key] - start[key]).flatten().double() for key in start])
    apart = torch.cat([(wanted[key] - got[key]).flatten().double() for key in start])
    rounding = steps * 2**-24 * torch.cat([x.flatten().double() for x in start.values()]).norm()
    assert torch.isfinite(apart).all(), f"{name}: not finite"
    assert moved.norm() > 100 * rounding, f"{name}: nothing was trained"
    budget = relative * moved.norm() + rounding
    assert apart.norm() <= budget, f"{name}: {apart.norm():.2e} apart of {moved.norm():.2e} moved, budget {budget:.1e}"


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
