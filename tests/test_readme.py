"""Every snippet of the README runs: Python as it stands, on a tiny model; commands as far as their options go."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
import typer.main

import hf_gdn
from hf_gdn.cli.app import app
from tests import tiny

ROOT = Path(hf_gdn.__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [text for name, text in found if name == kind]


def commands() -> list[list[str]]:
    """The arguments of hf-gdn in every line of shell that calls it."""
    found = []
    for block in blocks(""):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "hf_gdn.eval" in words:
                words = ["hf-gdn", *words[words.index("hf_gdn.eval") + 1 :]]
            if words[:1] == ["hf-gdn"]:
                found.append(words[1:])
    return found


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the snippets take for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_GDN_BACKEND", raising=False)
    model, draft = tiny.model("qwen3_next"), tiny.model("qwen3_next", seed=1)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    ids = torch.randint(1, 64, (1, 30))
    return dict(model=model, draft=draft, inputs=dict(input_ids=ids, attention_mask=torch.ones_like(ids)))


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python(number, names):
    hf_gdn.patch()
    exec(blocks("python")[number], dict(names, hf_gdn=hf_gdn))


def test_what_is_left_of_the_examples(names):
    """The three of caches are ten lines at most, and do what their comments say."""
    hf_gdn.patch()
    for word in ("SinkCache", "PrefixCache", "assistant_model"):
        (code,) = (block for block in blocks("python") if word in block)
        assert len(code.splitlines()) <= 10
    (code,) = (block for block in blocks("python") if "PrefixCache" in block)
    exec(code, names)
    assert names["prefixes"].tokens_read == names["cache"].get_seq_length() == 29


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_commands(arguments):
    command = typer.main.get_command(app)
    name, rest = arguments[0], [word.replace("…", "MODEL") for word in arguments[1:]]
    command.commands[name].make_context(name, rest)


def test_commands_that_are_not_there_are_found():
    assert len(commands()) >= 7
    with pytest.raises(Exception, match="No such option"):
        test_commands(["ppl", "--no-such-option"])


def test_make():
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("")), re.M)
    assert targets == ["report", "test"]
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets)
