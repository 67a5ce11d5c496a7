"""The examples in public docstrings run, on a tiny model: ``model`` and ``inputs`` are what a user has loaded."""

import doctest

import pytest
import torch

import hf_gdn
from hf_gdn import caches, ops, testing
from hf_gdn.testing import tolerances
from tests import tiny_models as tiny

PUBLIC = [
    *(getattr(hf_gdn, name) for name in ("patch", "patched", "status", "unpatch", "unpatched")),
    *(getattr(ops, name) for name in ops.__all__),
    *(getattr(caches, name) for name in caches.__all__ if name not in ("Snapshot", "SnapshotError")),
    hf_gdn.patches.layer_kernels,
    *(getattr(testing, name) for name in testing.__all__ if name != "Case"),
    tolerances.budget,
]


def examples(function) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(function.__doc__ or "")


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_examples(function, tmp_path, monkeypatch):
    assert examples(function), f"{function.__name__} has no example"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ids = torch.arange(3, 11)[None]
    names = dict(
        hf_gdn=hf_gdn,
        torch=torch,
        model=tiny.model("qwen3_next"),
        inputs=dict(input_ids=ids, attention_mask=torch.ones_like(ids)),
    )
    if function.__module__.startswith("hf_gdn.caches"):
        hf_gdn.patch()  # patched models take a cache by either name
    test = doctest.DocTest(examples(function), names, function.__name__, None, 0, None)
    said = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    doctest.DocTestRunner(optionflags=flags, verbose=False).run(test, out=said.append)
    assert not said, "".join(said)
