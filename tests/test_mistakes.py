"""What users get wrong: a command says it in one line and exits 2. A new mistake is a row of the table.

A row gets an empty folder, makes the mistake there, and returns the command line and a part of what is said.
"""

import builtins
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gdn import cli
from hf_gdn.eval.resume import Journal
from hf_gdn.loading.models import ASSETS
from tests import tiny_models as tiny

MODEL = "qwen3_next-tiny"


# ------------------------------------------------------------------------------------------------------------- commands


def copied(folder: Path) -> Path:
    """A copy of an embedded model that can be damaged."""
    return Path(shutil.copytree(ASSETS / MODEL, folder / "model"))


def ppl(folder: Path, model: Path | str = MODEL, *more: str) -> list[str]:
    given = ["--windows", "1", "--context", "32", "--output", str(folder / "out")]
    return ["ppl", "--model", str(model), *given, *more]


def truncated_weights(folder, monkeypatch):
    model = copied(folder)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return ppl(folder, model), "cannot be loaded: SafetensorError: "


def empty_weights(folder, monkeypatch):
    model = copied(folder)
    (model / "model.safetensors").write_bytes(b"")
    return ppl(folder, model), "cannot be loaded: SafetensorError: Error while deserializing header: header too small"


def weights_that_are_text(folder, monkeypatch):
    model = copied(folder)
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    return ppl(folder, model), "cannot be loaded: SafetensorError: "


def no_weights(folder, monkeypatch):
    model = copied(folder)
    (model / "model.safetensors").unlink()
    return ppl(folder, model), "cannot be loaded: "


def a_shard_is_missing(folder, monkeypatch):
    model = copied(folder)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + (i > 5)}-of-00002.safetensors" for i, name in enumerate(weights)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return ppl(folder, model), "cannot be loaded: "


def an_index_that_is_no_json(folder, monkeypatch):
    model = copied(folder)
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text("{")
    return ppl(folder, model), "cannot be loaded: "


def a_weight_is_missing(folder, monkeypatch):
    model = copied(folder)
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return ppl(folder, model), "cannot be loaded: its files lack the weight model.norm.weight"


def a_weight_of_another_shape(folder, monkeypatch):
    model = copied(folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "head_dim": 2 * config["head_dim"]}))
    return ppl(folder, model), "cannot be loaded: its file has model.layers."


def weights_in_a_damaged_pickle(folder, monkeypatch):
    model = copied(folder)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"not a pickle")
    return ppl(folder, model), "cannot be loaded: "


def weights_in_a_pickle_that_runs_code(folder, monkeypatch):
    model = copied(folder)
    (model / "model.safetensors").unlink()
    torch.save({"x": Path("never made")}, model / "pytorch_model.bin")
    return ppl(folder, model), "cannot be loaded: "


def a_config_that_is_no_json(folder, monkeypatch):
    model = copied(folder)
    (model / "config.json").write_text("{")
    return ppl(folder, model), "cannot be read: "


def a_config_that_is_a_list(folder, monkeypatch):
    model = copied(folder)
    (model / "config.json").write_text("[]")
    return ppl(folder, model), "cannot be read: "


def a_config_with_a_word_for_a_number(folder, monkeypatch):
    model = copied(folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": "four"}))
    return ppl(folder, model), "cannot be read: "


def _zero(field, text=""):
    def row(folder, monkeypatch):
        model = copied(folder)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, field: 0}))
        return ppl(folder, model), f"cannot be loaded: {text}"

    row.__name__ = f"a_config_of_{field}_0"
    return row


def a_damaged_tokenizer(folder, monkeypatch):
    model = copied(folder)
    (model / "tokenizer.json").write_text("{}")
    return ppl(folder, model), "cannot be loaded: "


def _tokenizer(name, part, text, **changes):
    """A tokenizer.json with `changes` in a part of it; None leaves a field out."""

    def row(folder, monkeypatch):
        model = copied(folder)
        whole = json.loads((model / "tokenizer.json").read_text())
        changed = whole[part] if part else whole
        changed |= changes
        for field in [field for field, value in changes.items() if value is None]:
            del changed[field]
        (model / "tokenizer.json").write_text(json.dumps(whole))
        return ppl(folder, model), f"cannot be loaded: {text}"

    row.__name__ = f"a_tokenizer_{name}"
    return row


def no_such_model(folder, monkeypatch):
    return ppl(folder, "nowhere/at-all"), "model 'nowhere/at-all' cannot be read"


def another_architecture(folder, monkeypatch):
    transformers.GPT2Config().save_pretrained(folder / "gpt2")
    return ppl(folder, folder / "gpt2"), "is of type 'gpt2', which hf_gdn does not patch"


def _loading_raises(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)


def memory_is_full(folder, monkeypatch):
    _loading_raises(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee docs."))
    return ppl(folder), "cannot be loaded: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."


def host_memory_is_full(folder, monkeypatch):
    _loading_raises(monkeypatch, MemoryError())
    return ppl(folder), "cannot be loaded: MemoryError: out of memory"


def the_disk_is_full(folder, monkeypatch):
    _loading_raises(monkeypatch, OSError(28, "No space left on device"))
    return ppl(folder), "cannot be loaded: No space left on device"


def weights_that_may_not_be_read(folder, monkeypatch):
    _loading_raises(monkeypatch, PermissionError(13, "Permission denied"))
    return ppl(folder), "cannot be loaded: Permission denied"


def a_tokenizer_that_lacks_a_key(folder, monkeypatch):
    def fail(*_, **__):
        raise KeyError("added_tokens")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    return ppl(folder), "cannot be loaded: KeyError: no 'added_tokens'"


def a_data_set_that_is_not_there(folder, monkeypatch):
    return ppl(folder, MODEL, "--dataset", str(folder / "nothing")), "cannot be loaded: "


def a_data_set_that_is_damaged(folder, monkeypatch):
    (folder / "data").mkdir()
    (folder / "data" / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    return ppl(folder, MODEL, "--dataset", str(folder / "data"), "--split", "train"), "cannot be loaded: "


def a_damaged_parquet_file(folder, monkeypatch):
    (folder / "a.parquet").write_bytes(b"PAR1")
    return ppl(folder, MODEL, "--text", str(folder / "a.parquet")), "cannot be read as parquet: "


def json_that_is_too_deep(folder, monkeypatch):
    (folder / "a.jsonl").write_text("[" * 100_000)
    return ppl(folder, MODEL, "--text", str(folder / "a.jsonl")), "line 1 is no JSON"


def a_text_that_is_no_text(folder, monkeypatch):
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    return ppl(folder, MODEL, "--text", str(folder / "a.txt")), "cannot be read as UTF-8"


def an_output_that_is_a_file(folder, monkeypatch):
    (folder / "out").write_text("")
    return ppl(folder), "cannot be written: "


def _device(name):
    def row(folder, monkeypatch):
        return ppl(folder, MODEL, "--device", name), f"--device {name} cannot be used here: "

    row.__name__ = f"device_{name.replace(':', '_')}"
    return row


def chat_with_a_device_that_only_looks(folder, monkeypatch):
    return ["chat", "--device", "meta"], "--device meta cannot be used here: "


def doctor_on_a_device_that_only_looks(folder, monkeypatch):
    return ["doctor", "--device", "meta"], "--device meta cannot be used here: "


def kernels_on_a_device_that_only_looks(folder, monkeypatch):
    given = ["kernels", "--device", "meta", "--output", str(folder / "out")]
    return given, "--device meta cannot be used here: "


def _chat(name, text, *arguments):
    def row(folder, monkeypatch):
        for family in ("glm5_next", "qwen4_exp"):
            tiny.config(family).save_pretrained(folder / family)
        transformers.GPT2Config().save_pretrained(folder / "gpt2")
        return ["chat", *(argument.format(folder) for argument in arguments)], text

    row.__name__ = f"chat_{name}"
    return row


COMMANDS = [
    truncated_weights, empty_weights, weights_that_are_text, no_weights, a_shard_is_missing, an_index_that_is_no_json,
    a_weight_is_missing, a_weight_of_another_shape, weights_in_a_damaged_pickle, weights_in_a_pickle_that_runs_code,
    a_config_that_is_no_json, a_config_that_is_a_list, a_config_with_a_word_for_a_number,
    _zero("linear_num_key_heads"), _zero("num_attention_heads", "ZeroDivisionError: "),
    _zero("num_key_value_heads", "ZeroDivisionError: "), _zero("head_dim", "ZeroDivisionError: "), a_damaged_tokenizer,
    _tokenizer("of_a_newer_model", "model", "data did not match any variant of", type="Newer"),
    _tokenizer("of_a_newer_pre_tokenizer", "", "data did not match any variant of", pre_tokenizer={"type": "Newer"}),
    _tokenizer("whose_vocabulary_is_a_list", "model", "invalid type: sequence, expected a map", vocab=["a"]),
    _tokenizer("without_a_model", "", "Model missing", model=None),
    no_such_model, another_architecture, memory_is_full, host_memory_is_full, the_disk_is_full,
    weights_that_may_not_be_read, a_tokenizer_that_lacks_a_key, a_data_set_that_is_not_there,
    a_data_set_that_is_damaged, a_damaged_parquet_file, json_that_is_too_deep, a_text_that_is_no_text,
    an_output_that_is_a_file, _device("meta"), _device("xpu"), _device("hpu"), _device("vulkan"), _device("cuda:99"),
    _device("nonsense"), _device("cpu:"), chat_with_a_device_that_only_looks, doctor_on_a_device_that_only_looks,
    kernels_on_a_device_that_only_looks,
    _chat("no_model", "model 'nowhere/at-all' cannot be read", "nowhere/at-all"),
    _chat("no_sinks", "no attention sinks for model type 'glm5_next'", "{}/glm5_next"),
    _chat("no_sinks_either", "no attention sinks for model type 'qwen4_exp'", "--model", "{}/qwen4_exp"),
    _chat("another_model", "no attention sinks for model type 'gpt2'", "{}/gpt2"),
    _chat("two_models", "two models were given, a and --model b; expected one of them", "a", "--model", "b"),
    _chat("cold", "--temperature must be", "--temperature", "-1"),
    _chat("nan", "--temperature must be", "--temperature", "nan"),
    _chat("nothing_to_sample", "--top-p must be", "--top-p", "0"),
    _chat("penalty", "--repetition-penalty must be above 0, got 0.0", "--repetition-penalty", "0"),
    _chat("greedy_top_p", "expected one of them", "--top-p", "0.5", "--temperature", "0"),
    _chat("greedy_too", "--greedy is greedy, and --top-p samples", "--greedy", "--top-p", "0.5"),
    _chat("greedy_and_warm", "--greedy takes the likeliest token", "--greedy", "--temperature", "0.5"),
    _chat("backend", "unknown backend 'other'", "--backend", "other"),
    _chat("dtype", "--dtype other is not known", "--dtype", "other"),
]  # fmt: skip


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.__name__.strip("_"))
def test_a_command_says_it_in_one_line(row, tmp_path, monkeypatch, capsys):
    def no_input(*_):
        raise AssertionError("a chat began")

    monkeypatch.setattr(builtins, "input", no_input)
    arguments, text = row(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["hf-gdn", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    err = "".join(line for line in capsys.readouterr().err.splitlines(True) if not line.startswith("compiling "))
    assert stopped.value.code == 2 and text in err and err.startswith("hf-gdn: ") and err.count("\n") == 1, err
    assert not os.path.exists("never made")


def test_nothing_to_resume_is_said(tmp_path, caplog):
    job = {"kind": "ppl"}
    Journal(tmp_path, job, resume=True)
    assert caplog.messages == [f"--resume: nothing to resume in {str(tmp_path)!r}; the run starts from the beginning"]
    caplog.clear()
    Journal(tmp_path, job, resume=True).add("row", {"x": 1})
    caplog.clear()
    assert "row" in Journal(tmp_path, job, resume=True) and "row" not in Journal(tmp_path, job)
    assert not caplog.messages
