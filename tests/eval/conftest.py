"""A small real report, made once, and a backend that is wrong."""

import dataclasses
import json

import pytest
import torch

from hf_gdn import registry
from tests import tiny
from tests.eval.commands import PARITY, SPEED, run


@pytest.fixture(scope="session")
def default_report(tmp_path_factory):
    """One real run of the main job, small."""
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    return folder, run("report", *PARITY, *SPEED, "--output", str(folder))


@pytest.fixture(scope="session")
def found(default_report):
    return json.loads((default_report[0] / "report.json").read_text())


@pytest.fixture
def broken():
    """Kernels of a backend "broken" that forget to decay the state."""
    for op in tiny.DELTA_RULES:
        eager = registry.get(op, "eager")

        def fn(q, k, v, g, beta, eager=eager, **kwargs):
            return eager.fn(q, k, v, torch.zeros_like(g), beta, **kwargs)

        registry.register(dataclasses.replace(eager, backend="broken", fn=fn))
    yield
    for op in tiny.DELTA_RULES:
        registry.unregister(op, "broken")
