"""`hf-gdn kernels --level layer`: sides in turns, a check before every time, and the projections alone."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from hf_gdn.cli.app import app
from hf_gdn.errors import UserError
from hf_gdn.eval import accuracy, goals, layer_bench, layer_cases
from hf_gdn.eval.kernel_results import Ceilings, LayerRow
from hf_gdn.eval.options import KernelBenchOptions
from hf_gdn.loading import layers, models, shapes
from tests import tiny_models as tiny

CPU = torch.device("cpu")
TINY = ("qwen3_next-tiny", "kimi_linear-tiny")
FAST = KernelBenchOptions(level="layer", seconds=1e-3, rounds=2)


def measure(shape, phase, batch=2, tokens=9, backends=("eager",), dtype="float32", options=FAST):
    case = layer_cases.Case(shape, phase, batch, 1 if phase == "decode" else tokens, backends)
    return {row.side: row for row in layer_bench.measure(case, options, CPU, models.DTYPES[dtype])}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("phase", layer_cases.PHASES)
@pytest.mark.parametrize("shape", TINY)
def test_rows(shape, phase, dtype):
    rows = measure(shape, phase, dtype=dtype)
    assert list(rows) == ["original", "eager", "projections alone"]
    original, ours, floor = rows.values()
    assert all(row.note is None and 0 < row.low <= row.ms <= row.high and row.runs >= 6 for row in rows.values()), rows
    assert ours.passed and ours.error <= ours.budget == accuracy.LAYER_ERROR[models.DTYPES[dtype]]
    assert original.passed is floor.passed is None and original.speedup == floor.share_projections == 1
    assert ours.speedup == pytest.approx(original.ms / ours.ms)
    assert ours.share_projections == pytest.approx(floor.ms / ours.ms)
    assert original.first_ms > 0 and ours.first_ms > 0 and floor.first_ms is None
    assert floor.beside_ms is None and ours.beside_ms <= ours.high and original.beside_ms <= original.high


def test_work_and_floor():
    """Counted by hand: hidden 160, 2 key and 4 value heads of 32, 4 taps (the embedded Qwen3-Next)."""
    config = json.loads((shapes.ASSETS / "qwen3_next-tiny" / "config.json").read_text())
    width, shape = config["hidden_size"], shapes.SHAPES["qwen3_next-tiny"]
    keys, values = shape.k_heads * shape.k_dim, shape.v_heads * shape.v_dim
    projections = width * (2 * keys + 2 * values + 2 * shape.v_heads) + values * width
    small = 4 * (2 * keys + values) + 2 * shape.v_heads + shape.v_dim
    states = 2 * 3 * (2 * 4 * (2 * keys + values) + 4 * shape.v_heads * shape.k_dim * shape.v_dim)
    row = measure("qwen3_next-tiny", "decode", batch=3, dtype="bfloat16")["eager"]
    assert row.moved_bytes == 2 * (projections + small) + 2 * 2 * 3 * width + states
    assert row.flops == 2 * 3 * projections
    slow_copy, slow_products = Ceilings(1e-3, 1e3), Ceilings(1e3, 1e-6)
    assert layer_bench.with_floors([row], slow_copy)[0].floor_ms == pytest.approx(row.moved_bytes / 1e3)
    assert layer_bench.with_floors([row], slow_products)[0].floor_ms == pytest.approx(row.flops / 1e3)
    assert layer_bench.with_floors([LayerRow("x", "first call", 1, 1, "")], slow_copy)[0].floor_ms is None


def test_goals_of_a_cpu():
    def goal(shape, phase, batch, tokens, dtype="bfloat16"):
        row = LayerRow(shape, phase, batch, tokens, "eager", dtype)
        return goals.of_layer(row, CPU, original=80.0, projections=6.0)

    assert goal("qwen3_next-80b", "decode", 4, 1) == pytest.approx(6 + 4 * 0.8)
    assert goal("kimi_linear-48b", "decode", 1, 1, "float32") == pytest.approx(6.6)
    assert goal("qwen3_next-80b", "prefill", 1, 512) == 50 and goal("kimi_linear-48b", "prefill", 1, 512) == 10
    assert goal("qwen3_next-80b", "prefill", 2, 512) is goal("qwen3_next-80b", "decode", 1, 1, "float16") is None
    assert goal("olmo_hybrid", "decode", 1, 1) is None


def test_a_wrong_layer_has_no_time(broken):
    rows = measure("qwen3_next-tiny", "prefill", backends=("eager", "broken"))
    wrong = rows["broken"]
    assert wrong.passed is False and wrong.ms is None and wrong.note == "wrong result" and wrong.error > wrong.budget
    assert rows["eager"].ms > 0 and rows["original"].ms > 0


@pytest.mark.parametrize("shape", TINY)
def test_the_projections_are_the_linear_modules_of_a_call(shape):
    layer, config = layers.make_layer(shape, CPU, torch.float32)
    x = torch.randn(1, 5, config.hidden_size)
    with torch.inference_mode():
        run = layer_bench._projections(layer, config, x, layer_cases.Case(shape, "prefill", 1, 5, ()))
        found = run()
        linear = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        assert len(found) == len(linear) >= 3
        assert torch.allclose(found[-1], layer(x), atol=1e-6)  # the output projection comes last


def test_plan():
    cases, left_out = layer_cases.plan(KernelBenchOptions(), CPU, torch.float32)
    assert [(c.phase, c.batch, c.tokens, c.backends) for c in cases if c.shape == "qwen3_next-80b"] == [
        ("prefill", 1, 512, tiny.ON_A_CPU),
        ("decode", 1, 1, tiny.ON_A_CPU),
        ("decode", 4, 1, tiny.ON_A_CPU),
    ]
    assert any(line.startswith("triton is left out of chunk_gdn: it needs a CUDA device") for line in left_out)
    options = KernelBenchOptions(shapes=TINY[:1], batch=(1, 8), tokens=(7,), phases=("decode", "prefill"))
    cases, _ = layer_cases.plan(options, CPU, torch.float32)
    assert [(c.phase, c.batch, c.tokens) for c in cases] == [
        ("decode", 1, 1),
        ("decode", 8, 1),
        ("prefill", 1, 7),
        ("prefill", 8, 7),
    ]
    assert len({case.key for case in cases}) == 4


def test_plan_of_a_gpu():
    cases, _ = layer_cases.plan(KernelBenchOptions(phases=("decode",)), torch.device("cuda"), torch.bfloat16)
    assert [case.batch for case in cases[:5]] == [1, 8, 32, 128, 256] and "eager" in cases[0].backends


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(shapes=("gpt2",)), "--shape gpt2 is not known"),
        (dict(shapes=("kimi_linear-48b-tp8",)), "--shape kimi_linear-48b-tp8 is a part of a layer"),
        (dict(phases=("train",)), "--phase train is not known; phases: prefill, decode"),
        (dict(phases=()), "no phase is given; phases: prefill, decode"),
        (dict(phases=("decode",), tokens=(5,)), "--tokens are of --phase prefill; a decode step takes one token"),
        (dict(ops=("chunk_gdn",)), "--op, --direction and --normalized are of --level op"),
        (dict(normalized=True), "--op, --direction and --normalized are of --level op"),
        (dict(backends=("transformers",)), "--backend transformers is not known; backends: triton, fla, numba, eager"),
        (dict(backends=("triton",)), "backend 'triton' cannot serve chunk_gdn at qwen3_next-80b: needs a CUDA device"),
        (dict(first_call=True, quantize="int8"), "--first-call measures layers that are not quantized"),
        (dict(batch=(0,)), "--batch must be at least 1, got 0"),
        (dict(seconds=0.0), "--seconds must be above 0, got 0.0"),
    ],
)
def test_bad_options(changes, text):
    with pytest.raises(UserError) as error:
        layer_cases.plan(KernelBenchOptions(**changes), CPU, torch.float32)
    assert text in str(error.value)


@pytest.mark.parametrize("name", ["qwen3_next-80b", "kimi_linear-48b", "olmo_hybrid", "qwen3_5_moe-35b"])
def test_layers_have_their_models_width(name):
    layer, config = layers.make_layer(name, torch.device("meta"), torch.bfloat16)
    assert layer.hidden_size == config.hidden_size >= 2048


def test_the_command(tmp_path, broken):
    sizes = ["--shape", "qwen3_next-tiny", "--batch", "1", "--seconds", "0.001", "--rounds", "1"]
    arguments = ["kernels", "--level", "layer", *sizes, "--output"]
    options = ["--tokens", "6", "--backend", "eager"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "a"), *options])
    assert result.exit_code == 0, result.output
    assert "PASSED: 2 patched layers of 2 within their dtype's error of the original" in result.output
    found = json.loads((tmp_path / "a" / "report.json").read_text())
    assert found["kind"] == "kernels" and "kernels" not in found and found["results"] == []
    rows = [(row["phase"], row["side"]) for row in found["layers"]]
    sides = ["original", "eager", "projections alone"]
    assert rows == [*(("prefill", side) for side in sides), *(("decode", side) for side in sides)]
    assert all(row["ms"] > 0 for row in found["layers"])
    assert "layer of qwen3_next-tiny, decode, float32" in (tmp_path / "a" / "report.html").read_text()
    assert "qwen3_next-tiny,layers," in (tmp_path / "a" / "report.csv").read_text()
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "b"), "--phase", "decode"])
    assert result.exit_code == 1
    assert "FAILED: layer decode, qwen3_next-tiny, 1 × 1, broken: wrong result" in result.output


@pytest.mark.extended
def test_first_calls(tmp_path):
    sizes = ["--shape", "qwen3_next-tiny", "--batch", "1", "--seconds", "0.001", "--rounds", "1", "--tokens", "6"]
    options = ["--level", "layer", *sizes, "--backend", "eager", "--first-call", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["kernels", *options])
    assert result.exit_code == 0, result.output
    rows = [row for row in json.loads((tmp_path / "report.json").read_text())["layers"] if row["phase"] == "first call"]
    assert [row["side"] for row in rows] == [f"patched, Triton's cache {cache}" for cache in ("empty", "filled")]
    assert all(row["ms"] > 0 for row in rows)


def test_an_unknown_level(tmp_path):
    result = CliRunner().invoke(app, ["kernels", "--level", "model", "--output", str(tmp_path)])
    assert str(result.exception) == "--level model is not known; levels: op, layer"


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_graph", [False, True])
@pytest.mark.parametrize("phase", layer_cases.PHASES)
def test_rows_on_a_gpu(phase, gpu_graph):
    options = dataclasses.replace(
        FAST,
        shapes=TINY,
        phases=(phase,),
        tokens=(9,) if phase == "prefill" else (),
        batch=(2,),
        gpu_graph=gpu_graph,
        backends=("triton", "eager"),
    )
    device = torch.device("cuda")
    cases, _ = layer_cases.plan(options, device, torch.bfloat16)
    for case in cases:
        rows = {row.side: row for row in layer_bench.measure(case, options, device, torch.bfloat16)}
        assert rows["triton"].passed and rows["triton"].ms > 0, rows
