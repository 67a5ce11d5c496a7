"""The examples run on the embedded model and print what they say they print."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import hf_gdn
from hf_gdn.patches import packing

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NUMBER = re.compile(r"\d[\d,.]*(?:e-\d+)?")

# Warnings of transformers and PEFT about names of their own arguments, and of a loader that finds no accelerator.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning"),
]


def promised(path):
    """The lines of an example's docstring that say what it prints."""
    docstring = runpy.run_path(str(path))["__doc__"]
    return [line.strip() for line in docstring.strip().splitlines() if re.match(r" {4}[a-z]+[: ]", line)]


def is_command(line):
    return line.startswith(("python", "accelerate", "pip"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_it_says(path, tmp_path, monkeypatch, capsys):
    if path.stem == "sft_trl":
        pytest.importorskip("trl")
    cuts, bounds = [], packing.bounds

    def counted(*arguments):
        cuts.append(bounds(*arguments))
        return cuts[-1]

    monkeypatch.setattr(packing, "bounds", counted)
    arguments = ["--steps", "8"] + ([] if path.stem == "lora_peft" else ["--output", str(tmp_path)])
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    expected = [line for line in promised(path) if not is_command(line)]
    try:
        runpy.run_path(str(path), run_name="__main__")
        assert hf_gdn.status().active
    finally:
        hf_gdn.unpatch()
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    assert [NUMBER.sub("N", line) for line in printed] == [NUMBER.sub("N", line) for line in expected]
    first, last = next(NUMBER.findall(line) for line in printed if line.startswith("loss"))
    assert path.stem != "lora_peft" or float(last) < float(first.rstrip(","))  # the others see other batches
    # Documents that TRL packs into a row are separate in the linear-attention layers.
    assert any(found is not None and len(found) > 2 for found in cuts) == (path.stem == "sft_trl")
    assert len(path.read_text().splitlines()) <= 60
