"""The commands: pass on the real kernels, fail on a broken one, write every format, refuse bad input in one line."""

import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

from hf_gdn import cli, patches
from hf_gdn.eval import results, writers
from hf_gdn.loading import models, stdlib_text
from tests import tiny_models as tiny
from tests.eval.commands import PARITY, QUICK, SPEED, invoke, run

ROOT = Path(__file__).parents[2]


def test_default_report(default_report, found):
    folder, (code, out, err) = default_report
    assert code == 0, err
    assert "PASSED" in out and "Traceback" not in err
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "report.csv", "report.html"}
    assert found["passed"] and found["schema"] == results.SCHEMA and found["kind"] == "report"
    assert {r["model_type"] for r in found["results"]} == {"qwen3_next", "kimi_linear"}
    for result in found["results"]:
        rows = {row["name"]: row for row in result["parity"]["comparisons"]}
        assert list(rows)[:3] == ["prefill", "decode", "mixed"] and len(rows) == 5
        for row in rows.values():
            assert row["grade"] == "same" and abs(row["statistics"]["ppl_ratio"]["value"] - 1) < 1e-5
            assert 2 < row["statistics"]["ppl_original"]["value"] < 60
        cells = result["speed"]["cells"]
        assert [(cell["batch"], cell["prompt"]) for cell in cells] == [(1, 8), (1, 16), (2, 8), (2, 16)]
        assert all(cell["tokens"]["verdict"] == "same" and cell["speedup"]["generate"]["median"] > 0 for cell in cells)


def test_the_manifest_says_what_ran(found):
    assert found["machine"]["device"] == "cpu" and found["machine"]["threads"] == 1
    assert found["versions"]["torch"] == torch.__version__ and found["command"].startswith("hf-gdn report --context 64")
    assert found["processes"] == 1 and found["backend"] == "auto" and found["date"].endswith("+00:00")
    for result in found["results"]:
        assert set(result["baseline"].values()) <= {"torch", "fla", "causal_conv1d"} and len(result["baseline"]) == 4
        assert len(result["kernels"]) == 3 and all(tiny.ON_A_CPU[0] in kernel for kernel in result["kernels"].values())
        assert result["dtype"] == "float32" and result["attention"] == "sdpa" and result["parameters"] > 1e6


def names(value):
    """All keys of a report, those of layers, versions and the like aside."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            if key not in ("kernels", "baseline", "versions", "machine", "device_map", "tolerance"):
                yield from names(part)
    elif isinstance(value, list):
        for part in value:
            yield from names(part)


def test_every_key_is_documented(found, tmp_path):
    assert (
        invoke("kernels", "--op", "recurrent_kda", "--batch", "1", "--seconds", "0.01", "--output", tmp_path).exit_code
        == 0
    )
    kernels = json.loads((tmp_path / "report.json").read_text())
    text = (ROOT / "docs" / "report.md").read_text()
    assert f"version {results.SCHEMA}" in text
    keys = {*names(found), *names(kernels), *names(kernels["kernels"])}
    missing = sorted(key for key in keys if f"`{key}`" not in text)
    assert not missing, f"docs/report.md says nothing of {missing}"


def test_markdown_and_csv(default_report, found):
    folder, _ = default_report
    markdown = (folder / "report.md").read_text()
    assert "**PASSED: kimi_linear-tiny is the same model and generates" in markdown
    assert "### qwen3_next-tiny: is it the same model?" in markdown and "| prefill | " in markdown
    assert "original: torch" not in markdown and "causal_conv1d_fn: torch" in markdown
    assert "command: hf-gdn report --context 64" in markdown
    rows = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    assert tuple(rows[0]) == writers.CSV_HEADER
    by_name = {(row["model"], row["item"], row["side"], row["measure"]): row for row in rows}
    statistic = found["results"][0]["parity"]["comparisons"][0]["statistics"]["ppl_ratio"]
    row = by_name["kimi_linear-tiny", "prefill", "", "ppl_ratio"]
    assert float(row["value"]) == statistic["value"] and float(row["error"]) == statistic["error"]
    cell = found["results"][1]["speed"]["cells"][3]
    row = by_name["qwen3_next-tiny", "eager, 2 × 16", "patched", "ttft_ms"]
    assert float(row["value"]) == cell["patched"]["ttft_ms"]["median"] and float(row["low"]) <= float(row["high"])
    assert float(by_name["qwen3_next-tiny", "eager, 2 × 16", "original", "tpot_ms_p90"]["value"]) > 0


def test_json_has_no_nan():
    report = results.Report(machine={"a": [float("nan"), {"b": float("inf")}, 1.5]})
    assert json.loads(writers.to_json(report))["machine"] == {"a": [None, {"b": None}, 1.5]}


def test_a_broken_kernel_fails_the_report(broken, tmp_path):
    result = invoke(
        "report", *PARITY, *QUICK, "--model", "kimi_linear-tiny", "--output", tmp_path, "--backend", "broken"
    )
    assert result.exit_code == 1, result.output
    assert "FAILED" in result.output and "DIFFERENT" in result.output
    written = json.loads((tmp_path / "report.json").read_text())
    assert not written["passed"] and not any(model["passed"] for model in written["results"])
    page = (tmp_path / "report.html").read_text()
    assert "<b>FAILED</b>: kimi_linear-tiny, prefill: DIFFERENT (perplexity ratio" in page


def test_bounds_decide_the_exit_code(broken, tmp_path):
    loose = [part for name in ("ppl_ratio=1e9", "kl_mean=1e9", "same_top=0") for part in ("--tolerance", name)]
    arguments = ["ppl", *PARITY, "--backend", "broken", "--quiet", "--output", tmp_path]
    assert invoke(*arguments).exit_code == 1
    assert invoke(*arguments, *loose).exit_code == 0


def test_ppl_and_speed_are_halves_of_the_report(tmp_path):
    assert invoke("ppl", *PARITY, "--stride", "32", "--quiet", "--output", tmp_path / "ppl").exit_code == 0
    assert invoke("speed", *QUICK, "--quiet", "--output", tmp_path / "speed").exit_code == 0
    ppl, speed = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("ppl", "speed"))
    assert all("parity" in result and "speed" not in result for result in ppl["results"])
    assert all("speed" in result and "parity" not in result for result in speed["results"])
    assert ppl["results"][0]["parity"]["scored"] == 63 + 3 * 32
    assert (tmp_path / "ppl" / "report.html").exists() and (tmp_path / "speed" / "report.md").exists()


@pytest.mark.parametrize("name", models.embedded())
def test_a_model_and_texts_of_ones_own(tmp_path, name):
    source = models.ASSETS / name
    (tmp_path / "a.txt").write_text(stdlib_text.held_out_text()[:100_000])
    rows = stdlib_text.held_out_text()[100_000:200_000].split("\n\n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in rows))
    code, _, err = run(
        "ppl",
        "--context",
        "256",
        "--windows",
        "8",
        "--model",
        str(source),
        "--text",
        str(tmp_path / "a.txt"),
        "--text",
        str(tmp_path / "b.jsonl"),
        "--field",
        "body",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "out"),
    )
    assert code == 0, err
    (result,) = json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    assert result["dtype"] == "bfloat16" and result["parity"]["tolerance"]["ppl_ratio"] == 2e-3
    assert result["parity"]["text"].endswith("b.jsonl") and result["name"] == str(source)


def test_random_weights_at_a_config(tmp_path):
    arguments = [
        "--config",
        "qwen3_next-80b",
        "--layers",
        "4",
        "--set",
        "hidden_size=64",
        "--set",
        "num_experts=4",
        "--set",
        "vocab_size=512",
        "--set",
        "num_experts_per_tok=2",
    ]
    result = invoke("report", *arguments, *PARITY, *QUICK, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert found["random_weights"] and found["settings"][0] == "hidden_size=64" and len(found["kernels"]) == 3
    assert found["model"] == "qwen3_next-80b (random, 4 layers)" and found["parity"]["text"] == "random tokens"


@pytest.mark.parametrize("name", models.CONFIGS)
def test_known_configs_are_the_released_models(name):
    """Their sizes as published: 80 and 48 billion parameters, without making them."""
    config = models.read_config(models.Source(name, random=True))
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    billions = float(re.search(r"-(\d+)b", name).group(1))
    assert count / 1e9 == pytest.approx(billions, rel=0.03)
    assert config.layer_types.count("full_attention") / len(config.layer_types) == pytest.approx(0.25, abs=0.02)
    short = models.read_config(models.Source(name, random=True, layers=8))
    assert len(short.layer_types) == short.num_hidden_layers == 8
    assert short.layer_types == config.layer_types[:8] and short.layer_types[3] == "full_attention"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Things that cannot be used."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty.txt").write_text(" \n")
    (root / "short.txt").write_text("x = 1")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (root / "rows.jsonl").write_text('{"body": "x"}\n')
    (root / "file").write_text("")
    tiny.model("qwen3_next").save_pretrained(root / "no_tokenizer")
    (root / "llama").mkdir()
    (root / "llama" / "config.json").write_text('{"model_type": "llama"}')
    return root


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "{}/nowhere"], "model '{}/nowhere' cannot be read"),
        (["--model", "nobody/nothing"], "model 'nobody/nothing' cannot be read"),
        (
            ["--model", "{}/llama"],
            "is of type 'llama', which hf_gdn does not patch; types: bailing_hybrid, glm5_next, kimi_linear",
        ),
        (["--model", "{}/no_tokenizer"], "model '{}/no_tokenizer' cannot be loaded: it has no tokenizer"),
        (
            ["--config", "gpt-5"],
            "known to --config: qwen3_next-80b, kimi_linear-48b, kimi_linear-tiny, qwen3_next-tiny",
        ),
        (["--config", "qwen3_next-tiny", "--model", "x"], "--model and --config were both given"),
        (["--config", "qwen3_next-tiny", "--layers", "9"], "--layers must be between 1 and 4, got 9"),
        (
            ["--config", "qwen3_next-tiny", "--set", "depth=9"],
            "--set depth=9: qwen3_next configs have no field 'depth'",
        ),
        (["--config", "qwen3_next-tiny", "--set", "num_experts=x"], "expected FIELD=VALUE with VALUE as JSON"),
        (["--config", "qwen3_next-tiny", "--tp"], "--tp needs several processes"),
        (["--config", "qwen3_next-tiny", "--device-map", "auto"], "load a checkpoint; a --config has none"),
        (["--layers", "2"], "--layers and --set change a --config, and none was given"),
        (["--text", "{}/nothing.txt"], "text '{}/nothing.txt' cannot be read as UTF-8"),
        (["--text", "{}/binary.txt"], "cannot be read as UTF-8"),
        (["--text", "{}/empty.txt"], "text '{}/empty.txt' is empty"),
        (["--text", "{}/short.txt"], "a window takes 64; give a shorter --context"),
        (["--text", "{}/rows.jsonl"], "line 1 has no field 'text'; fields: body (--field)"),
        (["--text", "{}/file", "--dataset", "x"], "--text and --dataset were both given"),
        (["--dataset", "nobody/nothing:en"], "data set 'nobody/nothing:en', split 'test', cannot be loaded"),
        (["--context", "5000", "--windows", "1"], "--context is 5000 tokens; kimi_linear-tiny takes 4096 at most"),
        (["--stride", "65"], "--stride must be between 1 and --context 64, got 65"),
        (["--mode", "prefill,both"], "--mode both is not known; modes: prefill, decode, mixed"),
        (["--tolerance", "kl=1"], "--tolerance kl=1: no bound 'kl'; bounds: ppl_ratio, kl_mean, same_top"),
        (["--variant", "fast"], "--variant fast is not known; variants: eager, static, compile, graph"),
        (["--batch", "one"], "--batch one: expected whole numbers"),
        (["--prompt", "0"], "--prompt and --rounds must be at least 1"),
        (["--device", "warp"], "--device warp cannot be used here: Expected one of cpu"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--dtype", "int8"], "--dtype int8 is not known; dtypes: float32, bfloat16, float16"),
        (["--output", "{}/file"], "output folder '{}/file' cannot be written"),
        (["--backend", "triton"], "backend 'triton' cannot serve"),
        (["--backend", "gpu"], "unknown backend 'gpu'; valid backends: auto, triton, fla, numba, eager"),
    ],
    ids=lambda value: "_".join(part.strip("-").split("/")[-1] for part in value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(arguments, text, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "report.json").write_text("an earlier report")
    arguments = ["report", *PARITY, *SPEED, "--output", str(tmp_path), *(a.format(folder) for a in arguments)]
    monkeypatch.setattr(sys, "argv", ["hf-gdn", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("hf_gdn runs on")]
    assert text.format(folder) in err and lines[0].startswith("hf-gdn: ") and len(lines) == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "an earlier report"


def test_a_family_that_transformers_does_not_fit_is_the_verdict(tmp_path, monkeypatch):
    """The other model is compared all the same."""
    monkeypatch.setattr(type(patches.all_families()["kimi_linear"]), "model_name", "KimiLinearTower")
    arguments = ["report", *PARITY, "--batch", "1", "--prompt", "8", "--new-tokens", "4", "--rounds", "1"]
    result = invoke(*arguments, "--output", tmp_path)
    text = (
        "NOT PATCHED: kimi_linear-tiny runs as the original, nothing was compared (kimi_linear: "
        f"transformers.models.kimi_linear.modeling_kimi_linear of transformers {transformers.__version__} has no "
        "KimiLinearTower)"
    )
    assert result.exit_code == 2 and text in " ".join(result.output.split()), result.output
    found = json.loads((tmp_path / "report.json").read_text())
    kimi, qwen = found["results"]
    assert not found["passed"] and not kimi["passed"] and "parity" not in kimi and "speed" not in kimi
    assert kimi["not_patched"].endswith("has no KimiLinearTower")
    assert qwen["passed"] and qwen["speed"]["cells"][0]["counts"]
    assert text in (tmp_path / "report.md").read_text()
    assert kimi["not_patched"] in (tmp_path / "report.html").read_text()


def test_no_traceback_from_the_command_itself(tmp_path):
    code, _, err = run("report", "--model", str(tmp_path / "nowhere"), "--output", str(tmp_path))
    assert code == 2 and "Traceback" not in err and err.count("\n") == 1, err
