"""Quantized projections: hf_gdn calls the layer's own modules, whatever their weights are made of.

Both runs have the same quantized weights. torchao's int8 and bitsandbytes' nf4 weights are multiplied in fp32, so that
the usual budget holds; bitsandbytes' int8 rounds activations too, the same way unless one lies within 1e-7 of a tie.
"""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig
from typer.testing import CliRunner

import hf_gdn
from hf_gdn.cli.app import app
from hf_gdn.errors import UserError
from hf_gdn.loading.quantization import quantize
from hf_gdn.testing import assert_close, error
from hf_gdn.testing.tolerances import LAYER
from tests import tiny_models as tiny
from tests.ecosystem.common import TWO, logits, runs_ours

IDS, _ = tiny.batch()


@pytest.fixture
def quantization():
    return pytest.importorskip("torchao.quantization")


def compare(model, plain, budget=LAYER):
    """Patched against original on one quantized model, prefill and decode; `plain` are the logits before it was one."""
    wanted = logits(model, IDS)
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert error(wanted, plain) > 1e-3  # it was quantized
    with hf_gdn.patched(strict=True):
        assert runs_ours(model, IDS)
        assert_close("logits", logits(model, IDS), wanted, budget)
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), tokens)


def test_torchao_int8_weights(family, quantization):
    model = tiny.model(family)
    plain = logits(model, IDS)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    weights = {type(m.weight).__name__ for m in tiny.mixer(model).modules() if isinstance(m, torch.nn.Linear)}
    assert weights == {"Int8Tensor"}, "torchao changed the name of its int8 weights"
    compare(model, plain)


@pytest.mark.parametrize("family", TWO)
def test_torchao_through_from_pretrained(family, quantization, tmp_path):
    original = tiny.model(family)
    original.save_pretrained(tmp_path)
    hf_gdn.patch()  # loaded while patched
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()), device_map="cpu"
    )
    hf_gdn.unpatch()
    compare(model.eval(), logits(original, IDS))


def test_commands_quantize_both_sides(quantization, tmp_path):
    sizes = ["--batch", "1", "--quantize", "int8", "--rounds", "1"]
    speed = ["speed", "--model", "qwen3_next-tiny", "--prompt", "20", "--new-tokens", "4", *sizes]
    layer = ["kernels", "--level", "layer", "--shape", "qwen3_next-tiny", "--seconds", "0.001", "--tokens", "5", *sizes]
    for name, arguments in (("speed", speed), ("layer", layer)):
        result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "speed" / "report.json").read_text())["results"][0]
    assert found["quantize"] == "int8" and found["passed"] and "int8" in found["model"]
    rows = json.loads((tmp_path / "layer" / "report.json").read_text())["layers"]
    assert all(row["quantize"] == "int8" and row["ms"] > 0 for row in rows)


def test_the_output_embeddings_are_not_quantized(quantization):
    model = tiny.model("qwen3_next")
    quantize(model, "int8")
    assert type(model.lm_head.weight) is torch.nn.Parameter
    assert type(tiny.mixer(model).out_proj.weight).__name__ == "Int8Tensor"


def test_quantizing_that_is_impossible(monkeypatch):
    with pytest.raises(UserError, match="--quantize int3 is not known; kinds: int8"):
        quantize(torch.nn.Linear(2, 2), "int3")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="--quantize int8 needs torchao: pip install torchao"):
        quantize(torch.nn.Linear(2, 2), "int8")


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.parametrize("family", TWO)
def test_bitsandbytes(family, kind):
    """Its Linear classes in the place of the mixers' projections, as replace_with_bnb_linear puts them."""
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny.model(family)
    plain = logits(model, IDS)
    for layer in tiny.mixers(model):
        for name in tiny.projections(model):
            old = getattr(layer, name)
            rows, columns = old.weight.shape
            if kind == "8bit":
                new = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            setattr(layer, name, new.to("cpu"))
    compare(model, plain)
