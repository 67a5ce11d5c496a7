"""hf-gdn kernels as a command."""

import csv
import io
import json
import sys

import pytest

from hf_gdn import cli
from tests.eval.commands import invoke


def test_kernels_command(tmp_path, broken):
    arguments = ["kernels", "--op", "recurrent_gdn,recurrent_kda", "--batch", "1", "--seconds", "0.01", "--output"]
    result = invoke(*arguments, tmp_path / "a", "--backend", "transformers,eager")
    assert result.exit_code == 0 and "PASSED: 4 results of 4" in result.output, result.output
    found = json.loads((tmp_path / "a" / "report.json").read_text())
    assert found["kind"] == "kernels" and found["ceilings"]["copy_gb_s"] > 0 and len(found["kernels"]) == 4
    assert all(row["share_bandwidth"] > 0 and row["speedup"] > 0 for row in found["kernels"])
    page = (tmp_path / "a" / "report.html").read_text()
    assert "recurrent_kda, kimi_linear-48b, float32" in page
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a" / "report.csv").read_text())))
    assert {row["side"] for row in rows} == {"transformers", "eager"}
    result = invoke(*arguments, tmp_path / "b")
    assert (
        result.exit_code == 1 and "FAILED: recurrent_gdn, qwen3_next-80b, 1 × 1, broken: wrong result" in result.output
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--shape", "llama"], "--shape llama is not known; shapes: qwen3_next-80b"),
        (["--op", "softmax"], "--op softmax is not known; ops: chunk_gdn"),
        (["--backend", "magic"], "--backend magic is not known; backends: transformers"),
        (["--backend", "triton"], "backend 'triton' cannot serve chunk_gdn at qwen3_next-80b: needs a CUDA device"),
        (["--gpu-graph"], "--gpu-graph needs a CUDA device; the device is cpu"),
        (["--tokens", "x"], "--tokens x: expected whole numbers"),
    ],
)
def test_bad_input_of_kernels(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf-gdn", "kernels", "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and text in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())
