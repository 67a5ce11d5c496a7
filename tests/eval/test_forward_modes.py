"""The ways of reading a text agree."""

import math
from types import SimpleNamespace

import pytest
import torch

import hf_gdn
from hf_gdn.eval import forward_modes
from tests import tiny


class Successor(torch.nn.Module):
    """Gives token t + 1 half of the probability after token t, the others share the rest."""

    device = torch.device("cpu")

    def forward(self, ids, use_cache=False, **cache):
        logits = torch.zeros(*ids.shape, 5)
        logits.scatter_(-1, ((ids + 1) % 5)[..., None], math.log(4.0))
        return SimpleNamespace(logits=logits, **(cache or tiny.given(None)))


@pytest.mark.parametrize("mode", forward_modes.MODES)
def test_by_hand(mode):
    ids = torch.tensor([[0, 1, 2, 0]])  # 1/2, 1/2, 1/8
    done = []
    scores = forward_modes.log_probs(forward_modes.MODES[mode](Successor(), ids[:, :-1], done.append), ids[:, 1:])
    assert scores.exp().tolist() == [pytest.approx([0.5, 0.5, 0.125])] and sum(done) == 3
    assert forward_modes.perplexity(scores) == pytest.approx(32 ** (1 / 3))


def test_all_ways_agree(family):
    ids, _ = tiny.batch()
    model = tiny.model(family)
    whole = forward_modes.prefill(model, ids)
    for mode in forward_modes.MODES.values():
        with hf_gdn.patched():
            assert (mode(model, ids) - whole).abs().max() < 1e-4
