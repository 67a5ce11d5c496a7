"""Statistics against cases computed by hand, windows, and the two ways of reading a text."""

import math
from types import SimpleNamespace

import pytest
import torch

import hf_gdn
from hf_gdn.errors import UserError
from hf_gdn.eval import models, perplexity, speed
from tests import tiny


class Uniform(torch.nn.Module):
    """Gives token t + 1 half of the probability after token t, the others share the rest."""

    device = torch.device("cpu")

    def forward(self, ids, past_key_values=None, use_cache=False):
        logits = torch.zeros(*ids.shape, 5)
        logits.scatter_(-1, ((ids + 1) % 5)[..., None], math.log(4.0))
        return SimpleNamespace(logits=logits, past_key_values=None)


def test_by_hand():
    ids = torch.tensor([[0, 1, 2, 0]])  # 1/2, 1/2, 1/8
    for run in (perplexity.one_pass, perplexity.token_by_token):
        scores = run(Uniform(), ids)
        assert scores.exp().tolist() == [pytest.approx([0.5, 0.5, 0.125])]
        assert perplexity.perplexity(scores) == pytest.approx(32 ** (1 / 3))


def test_nan_and_overflow():
    assert math.isnan(perplexity.perplexity(torch.tensor([0.0, math.nan])))
    assert perplexity.perplexity(torch.tensor([-1e4])) == math.inf


def test_both_ways_agree(family):
    ids, _ = tiny.batch()
    model = tiny.model(family)
    done = []
    a = perplexity.one_pass(model, ids, batch=2, step=done.append)
    b = perplexity.token_by_token(model, ids)
    assert sum(done) == ids.numel() and a.shape == b.shape == (3, 69)
    assert (a - b).abs().max() < 1e-4
    with hf_gdn.patched():
        assert (perplexity.token_by_token(model, ids) - a).abs().max() < 1e-4


def words(text, **kwargs):
    return SimpleNamespace(input_ids=torch.arange(len(text.split()))[None])


def test_windows():
    text = models.Text("file", "a " * 100)
    assert models.windows(words, text, 30, 10)[:, 0].tolist() == [0, 30, 60]
    assert models.windows(words, text, 10, 4)[:, 0].tolist() == [0, 30, 60, 90]
    assert models.windows(words, text, 30, 1).shape == (1, 30)
    assert models.windows(words, text, 300, 2).shape == (1, 100)
    with pytest.raises(UserError, match="'file' has 15 tokens; at least 16"):
        models.windows(words, models.Text("file", "a " * 15), 30, 2)


def test_turns_alternate_and_compare_tokens():
    order = []

    def run(name, tokens):
        def call():
            order.append(name)
            return torch.tensor([tokens]), 0.5 if name == "a" else 0.25

        return call

    speeds, same = speed.in_turns({"a": run("a", [1, 2]), "b": run("b", [1, 2])}, rounds=2)
    assert order == ["a", "b"] * 3 and same
    assert speeds["a"].median == 4 and speeds["b"].median == 8
    assert not speed.in_turns({"a": run("a", [1]), "b": run("b", [2])}, rounds=1)[1]
