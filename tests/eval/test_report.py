"""The report and the command: passes on the real kernels, fails on a broken one, and refuses bad input in one line."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from hf_gdn import cli, registry
from hf_gdn.eval import data, microbench, models, report
from tests import tiny

SMALL = ("--context", "64", "--windows", "4", "--new-tokens", "4", "--rounds", "1")


def run(*arguments, **env):
    """The command in a process of its own: exit code, output, error output."""
    done = subprocess.run(
        [sys.executable, "-m", "hf_gdn", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def default_report(tmp_path_factory):
    """One real run of the main job, small."""
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    return folder, run("report", *SMALL, "--output", str(folder))


def test_default_report(default_report):
    folder, (code, out, err) = default_report
    assert code == 0, err
    assert "PASSED" in out and "Traceback" not in err
    result = json.loads((folder / "report.json").read_text())
    assert result["passed"] and result["schema"] == report.SCHEMA
    assert {r["model_type"] for r in result["results"]} == {"qwen3_next", "kimi_linear"}
    for model in result["results"]:
        for mode in ("one_pass", "token_by_token"):
            values = model["perplexity"][mode]
            assert abs(values["ratio"] - 1) < 1e-5 and 2 < values["original"] < 60
        assert model["generate"]["same_tokens"] and model["generate"]["speedup"] > 0
        assert set(model["baseline"].values()) <= {"torch", "fla", "causal_conv1d"} and len(model["baseline"]) == 4
        assert len(model["kernels"]) == 3 and all("eager" in kernel for kernel in model["kernels"].values())
    assert result["machine"]["device"] == "cpu" and result["versions"]["torch"] == torch.__version__
    markdown = (folder / "report.md").read_text()
    assert "**PASSED" in markdown and "| kimi_linear-tiny | perplexity, one pass |" in markdown
    assert "original ran on" in markdown and "command: `hf-gdn report" in markdown


@pytest.fixture
def broken():
    """Kernels of a backend "broken" that forget to decay the state."""
    for op in registry.ops():
        eager = registry.get(op, "eager")

        def fn(q, k, v, g, beta, eager=eager, **kwargs):
            return eager.fn(q, k, v, torch.zeros_like(g), beta, **kwargs)

        registry.register(dataclasses.replace(eager, backend="broken", fn=fn))
    yield
    for op in registry.ops():
        registry.unregister(op, "broken")


def test_a_broken_kernel_fails_the_report(broken, tmp_path):
    arguments = ["report", *SMALL, "--output", str(tmp_path), "--backend", "broken"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1, result.output
    assert "FAILED" in result.output and "NOT THE SAME" in result.output
    written = json.loads((tmp_path / "report.json").read_text())
    assert not written["passed"]
    for model in written["results"]:
        assert not model["perplexity"]["one_pass"]["passed"] and not model["perplexity"]["token_by_token"]["passed"]


def test_nan_fails_the_verdict():
    scores = {"original": torch.zeros(3), "patched": torch.tensor([0.0, float("nan"), 0.0])}
    assert not report._parity(scores, 1e-4)["passed"]


def test_a_model_and_a_text_of_ones_own(tmp_path, family):
    source = next(path for path in models.embedded() if family in path)
    text = tmp_path / "text.txt"
    text.write_text(data.held_out_text()[:200_000])
    size = ("--context", "256", "--windows", "8", "--new-tokens", "4", "--rounds", "1")
    code, _, err = run(
        "report", *size, "--model", source, "--text", str(text), "--dtype", "bfloat16", "--device", "cpu",
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    assert len(result) == 1 and result[0]["dtype"] == "bfloat16" and result[0]["tolerance"] == 2e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Things that cannot be used."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty.txt").write_text(" \n")
    (root / "short.txt").write_text("x = 1")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (root / "file").write_text("")
    tiny.model("qwen3_next").save_pretrained(root / "no_tokenizer")
    (root / "llama").mkdir()
    (root / "llama" / "config.json").write_text('{"model_type": "llama"}')
    return root


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "{}/nowhere"], "model '{}/nowhere' cannot be read"),
        (["--model", "{}/llama"], "is of type 'llama', which hf_gdn does not patch; types: kimi_linear, qwen3_next"),
        (["--model", "{}/no_tokenizer"], "model '{}/no_tokenizer' cannot be loaded: it has no tokenizer"),
        (["--text", "{}/nothing.txt"], "text '{}/nothing.txt' cannot be read as UTF-8"),
        (["--text", "{}/binary.txt"], "cannot be read as UTF-8"),
        (["--text", "{}/empty.txt"], "text '{}/empty.txt' is empty"),
        (["--text", "{}/short.txt"], "at least 16 are needed"),
        (["--device", "warp"], "--device warp cannot be used; devices here: cpu"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--dtype", "int8"], "--dtype int8 is not known; dtypes: float32, bfloat16, float16"),
        (["--output", "{}/file"], "output folder '{}/file' cannot be written"),
        (["--backend", "triton"], "backend 'triton' cannot serve"),
        (["--backend", "gpu"], "unknown backend 'gpu'; valid backends: auto, triton, fla, eager"),
        (["--context", "1"], "--context"),
    ],
    ids=lambda value: value[0].strip("-") + "_" + value[1].split("/")[-1] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(arguments, text, folder, tmp_path, monkeypatch, capsys):
    arguments = ["hf-gdn", "report", "--output", str(tmp_path), *(a.format(folder) for a in arguments)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert text.format(folder) in err.replace("\n", " ") and "Traceback" not in err
    if "--context" not in arguments:
        assert err.startswith("hf-gdn: ") and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_no_traceback_from_the_command_itself(tmp_path):
    code, _, err = run("report", "--model", str(tmp_path / "nowhere"), "--output", str(tmp_path))
    assert code == 2 and "Traceback" not in err and err.count("\n") == 1, err


def test_env_lists_every_kernel():
    code, out, err = run("env", COLUMNS="200")
    assert code == 0, err
    for kernel in registry.kernels():
        assert any(kernel.op in line and kernel.backend in line for line in out.splitlines())
    assert "serves" in out and "needs a CUDA device; the tensors are on cpu" in out and "torch " in out


@pytest.mark.parametrize("op", ["chunk_gdn", "recurrent_gdn", "chunk_kda", "recurrent_kda"])
def test_kernels_prints_no_time_for_a_wrong_result(op, broken):
    case = dataclasses.replace(next(c for c in microbench.CASES if c.op == op), tokens=3, k_heads=2, v_heads=2)
    rows = microbench.measure(case, torch.device("cpu"), torch.float32, seconds=0.01)
    by_backend = {row.backend: row for row in rows}
    assert by_backend["transformers"].speedup == 1 and by_backend["eager"].ms > 0
    assert by_backend["eager"].error < 1e-5 and by_backend["eager"].extra_mib > 0
    assert by_backend["broken"].ms != by_backend["broken"].ms and by_backend["broken"].error > 1e-2
