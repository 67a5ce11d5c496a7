"""Reading on and on: every way of reading gives what its description says."""

import json
import math
import sys

import pytest
import torch
from transformers import DynamicCache

import hf_gdn
from hf_gdn import cli
from hf_gdn.caches import SinkCache
from hf_gdn.errors import UserError
from hf_gdn.eval import forward_modes, long_stream
from tests import tiny


def nothing(done):
    """Progress that nobody watches."""


@pytest.fixture
def model():
    with hf_gdn.patched(strict=True):
        yield tiny.model("qwen3_next")


IDS = tiny.batch(1, 700)[0][0]


def test_through_a_cache_scores_every_token_but_the_first(model):
    wanted = forward_modes.log_probs(forward_modes.prefill(model, IDS[None])[:, :-1], IDS[None, 1:])[0]
    for cache in (DynamicCache(config=model.config), SinkCache(model.config, 4, 696)):
        counted = []
        got = long_stream.through(model, IDS, cache, counted.append)
        assert sum(counted) == 699 and torch.allclose(got, wanted, atol=1e-5)
    narrow = long_stream.through(model, IDS, SinkCache(model.config, 4, 28), nothing)
    assert torch.allclose(narrow[:32], wanted[:32], atol=1e-5) and not torch.allclose(narrow, wanted, atol=1e-3)


def test_windows_and_places_start_afresh(model):
    """Both know nothing of what is before their window."""
    got = long_stream.fresh(model, IDS, 64, nothing)
    assert got.isfinite().all()
    place = 64 + 32 * 3 - 2  # the last token but one of a window, so the same 63 tokens are before it
    places = torch.tensor([place, 650])
    again = long_stream.re_read(model, IDS, places, 63, nothing)
    assert again.isfinite().nonzero().flatten().tolist() == places.tolist()
    assert again[place].item() == pytest.approx(got[place].item(), abs=1e-5)


def test_ratio_is_on_the_tokens_that_both_have():
    nan = math.nan
    values, reference = torch.tensor([-1.0, -2.0, nan]), torch.tensor([nan, -1.0, -1.0])
    assert long_stream._ratio(values, reference) == pytest.approx(math.e)
    assert math.isnan(long_stream._ratio(values[2:], reference[2:]))


def test_command_prints_tables_and_draws(tmp_path, monkeypatch, capsys):
    text, folder = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("def first(x):\n    return x[0]\n\n\n" * 60)
    monkeypatch.setattr(sys, "argv", ["hf-gdn", "stream", "--text", str(text), "--context", "64", "--tokens", "400",
                                      "--output", str(folder), "--quiet"])  # fmt: skip
    monkeypatch.setattr(long_stream, "StreamOptions", lambda *given: _few(*given))
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    printed = capsys.readouterr().out
    report = json.loads((folder / "stream.json").read_text())
    assert [result["model"] for result in report["results"]] == ["kimi_linear-tiny", "qwen3_next-tiny"]
    for result in report["results"]:
        ways = result["ways"]
        assert set(ways) == set(long_stream.ABOUT) and result["ends"][-1] == result["tokens"] == 400
        assert ways["fresh"]["ratio"] == 1 and ways["sinks"]["bytes"] < ways["dense"]["bytes"]
        assert ways["sinks"]["tokens_s"] > 0 and ways["re-read"]["scored"] <= 10
        assert result["model"] in printed
    assert (folder / "stream.svg").read_text().count("<svg") == 1


_Options = long_stream.StreamOptions


def _few(*given):
    return _Options(*given, samples=10, timed=10)


@pytest.mark.parametrize(
    "options, text",
    [
        (long_stream.StreamOptions(context=4, sinks=4), "--sinks must be between 1"),
        (long_stream.StreamOptions(tokens=600), "--tokens must be"),
    ],
)
def test_options_that_make_no_sense(options, text):
    with pytest.raises(UserError, match=text):
        long_stream.check(options)
