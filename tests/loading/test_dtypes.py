"""In which dtype a model is measured where `--dtype` is not given: a checkpoint's own."""

import json

import pytest
import torch
from transformers import AutoConfig

from hf_gdn.errors import UserError
from hf_gdn.loading.models import DTYPES, Source, load, pick_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def checkpoint(tmp_path):
    """``checkpoint(dtype, family)``: a folder with a config that says `dtype`; None leaves it out, in its parts too."""

    def checkpoint(dtype, family="qwen3_next"):
        AutoConfig.for_model(family).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        for part in (config, config.get("text_config", {})):
            part.pop("dtype", None)
        if dtype is not None:
            config["dtype"] = dtype
        path.write_text(json.dumps(config))
        return Source(str(tmp_path))

    return checkpoint


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_a_checkpoints_own(checkpoint, family, dtype, device):
    assert pick_dtype(None, checkpoint(dtype, family), device) is DTYPES[dtype]


def test_the_text_models_where_the_whole_names_none(checkpoint):
    source = checkpoint(None, "qwen3_5")
    path = f"{source.name}/config.json"
    with open(path) as file:
        config = json.load(file)
    assert "text_config" in config
    config["text_config"]["dtype"] = "bfloat16"
    with open(path, "w") as file:
        json.dump(config, file)
    assert pick_dtype(None, source, CPU) is torch.bfloat16


def test_without_a_dtype_and_for_random_weights(checkpoint):
    source = checkpoint(None)
    assert pick_dtype(None, source, CPU) is torch.float32 and pick_dtype(None, source, GPU) is torch.bfloat16
    random = Source(checkpoint("float16").name, random=True)
    assert pick_dtype(None, random, CPU) is torch.float32 and pick_dtype(None, random, GPU) is torch.bfloat16


def test_the_embedded_models_are_float32():
    assert pick_dtype(None, Source("qwen3_next-tiny"), GPU) is torch.float32


def test_the_one_asked_for(checkpoint):
    assert pick_dtype("float16", checkpoint("bfloat16"), CPU) is torch.float16
    with pytest.raises(UserError, match="--dtype int8 is not known; dtypes: float32, bfloat16, float16"):
        pick_dtype("int8", checkpoint("bfloat16"), CPU)


def test_a_bfloat16_checkpoint_is_loaded_in_it_and_says_so(tmp_path):
    embedded = load(Source("qwen3_next-tiny"), CPU, torch.bfloat16)
    embedded.model.save_pretrained(tmp_path)
    embedded.tokenizer.save_pretrained(tmp_path)
    source = Source(str(tmp_path))
    loaded = load(source, CPU, pick_dtype(None, source, CPU))
    assert loaded.dtype == "bfloat16" and next(loaded.model.parameters()).dtype is torch.bfloat16
