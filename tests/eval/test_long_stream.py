"""Reading on and on: every way of reading gives what its description says."""

import dataclasses
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
from hf_gdn.eval import forward_modes, long_stream, options, writers
from hf_gdn.eval.results import STREAM_WAYS
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


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `hf-gdn stream` on a short text, with few samples; its exit code."""
    text = tmp_path / "text.txt"
    text.write_text("def first(x):\n    return x[0]\n\n\n" * 60)
    measure = long_stream.measure

    def few(loaded, ids, source, asked, *rest):
        return measure(loaded, ids, source, dataclasses.replace(asked, samples=10, timed=10), *rest)

    monkeypatch.setattr(long_stream, "measure", few)

    def run(*arguments):
        sizes = ("--context", "64", "--tokens", "400", "--output", str(tmp_path / "out"), "--quiet")
        monkeypatch.setattr(sys, "argv", ["hf-gdn", "stream", "--text", str(text), *sizes, *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code

    return run


def test_command_prints_tables_and_draws(command, tmp_path, capsys):
    assert command() == 0
    printed, folder = " ".join(capsys.readouterr().out.split()), tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {*writers.FILES, "stream.svg"}
    report = json.loads((folder / "report.json").read_text())
    assert report["kind"] == "stream" and report["passed"]
    assert [result["model"] for result in report["results"]] == ["kimi_linear-tiny", "qwen3_next-tiny"]
    for result in report["results"]:
        stream = result["stream"]
        ways = stream["ways"]
        assert set(ways) == set(STREAM_WAYS) and stream["ends"][-1] == stream["tokens"] == 400
        assert ways["fresh"]["ratio"] == 1 and ways["sinks"]["bytes"] < ways["dense"]["bytes"]
        assert ways["sinks"]["tokens_s"] > 0 and ways["re-read"]["scored"] <= 10
        assert f"{result['model']} reads 400 tokens with attention sinks at" in printed
    picture = (folder / "stream.svg").read_text()
    assert picture.count("<svg") == 1 and "#010" not in picture
    assert "| sinks: attention sinks |" in (folder / "report.md").read_text()
    assert "stream,sinks,,perplexity," in (folder / "report.csv").read_text()
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2 and "Along the stream" in page


def test_an_interrupted_stream_goes_on(command, monkeypatch):
    read, seen = long_stream._read, []

    def interrupted(way, *rest):
        seen.append(way)
        if way == "dense" and seen.count("dense") == 1:
            raise KeyboardInterrupt
        return read(way, *rest)

    monkeypatch.setattr(long_stream, "_read", interrupted)
    assert command("--model", "qwen3_next-tiny") == 130
    assert command("--model", "qwen3_next-tiny", "--resume") == 0
    assert seen == ["fresh", "sinks", "window", "dense", "dense", "re-read"]


@pytest.mark.parametrize(
    "asked, text",
    [
        (options.StreamOptions(context=4, sinks=4), "--sinks must be between 1"),
        (options.StreamOptions(tokens=600), "--tokens must be"),
    ],
)
def test_options_that_make_no_sense(asked, text):
    with pytest.raises(UserError, match=text):
        long_stream.check(asked)
