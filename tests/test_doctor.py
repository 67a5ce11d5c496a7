"""hf-gdn doctor: what it finds on a CPU, and what it makes of kernels that crash, hang, raise or are wrong."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from typer.testing import CliRunner

from hf_gdn import registry, verification
from hf_gdn.cli.app import app
from hf_gdn.doctor import children, examine, report
from hf_gdn.doctor.examine import CHECKED, NOT_SERVED, REFUSED, Finding
from hf_gdn.doctor.rows import Row, rows, shapes
from hf_gdn.errors import UserError
from hf_gdn.loading.shapes import SHAPES, embedded
from hf_gdn.patches import all_families
from hf_gdn.upstream import seams
from hf_gdn.verification import verdicts

TINY = "qwen3_next-tiny"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_GDN_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_GDN_VERIFY", "1")
    verification.forget()
    yield tmp_path / "verdicts"
    verification.forget()


def serves(kernel):
    return kernel.why_not(Row(kernel.op, kernel.backend, "float32", (1, 1, 8, 8), (), "cpu").request) is None


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})


def test_the_shapes_are_those_of_the_families_here():
    found = shapes()
    here = {name for name, family in all_families().items() if seams.has_module(family.module)}
    assert {name for names in found.values() for name in names} == here
    for name in ("qwen3_next-80b", "kimi_linear-48b", "olmo_hybrid"):
        shape = SHAPES[name]
        dims = shape.k_heads, shape.v_heads, shape.k_dim, shape.v_dim
        assert shape.model_type in found[shape.variant, dims, 2.0 if name == "olmo_hybrid" else 1.0]


def test_rows_ask_for_the_largest_beta_of_a_model():
    """A kernel that refuses it is not listed as serving the model."""
    found = [row for row in rows((), ["bfloat16"], "cpu") if "olmo_hybrid" in row.models]
    largest = {row.op: row.request.beta_max for row in found}
    assert largest["chunk_gdn"] == largest["backward_gdn"] == largest["recurrent_gdn"] == 2.0
    assert largest["step_gdn"] == largest["gated_norm"] == 1.0
    assert all(Row.of_json(row.as_json()) == row for row in found)


def test_the_shapes_of_a_model(tmp_path):
    for name in embedded():
        ((variant, dims, _), names), *others = shapes([name]).items()
        assert not others and names == (name,)
        assert (variant, dims) == (SHAPES[name].variant, (*SHAPES[name].sizes.values(),))
    with pytest.raises(UserError, match=r"model '.*nowhere' cannot be read"):
        shapes([str(tmp_path / "nowhere")])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is a llama; families: bailing_hybrid, "):
        shapes([str(tmp_path)])


def test_on_a_cpu():
    result = run("--model", TINY, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    for op in registry.ops():
        if not op.endswith("kda"):
            assert any(op in line and "yes" in line for line in result.output.splitlines()), op
    assert "triton chunk_gdn" in result.output and "needs a CUDA device; the tensors are on cpu" in result.output
    assert f"torch: {torch.__version__}" in result.output and "not installed: " in result.output
    served = [kernel for kernel in registry.kernels() if not kernel.op.endswith("kda") and serves(kernel)]
    assert f"PASSED: {len(served)} checked" in result.output


def test_as_json():
    result = run("--model", TINY, "--dtype", "bfloat16", "--json")
    found = json.loads(result.output)
    assert result.exit_code == 0 and found["layout"] == report.LAYOUT and found["passed"] is True
    assert {"machine", "versions", "status", "seconds", "command"} <= found.keys()
    served = {row["op"] for row in found["kernels"] if row["serves"]}
    assert served == {op for op in registry.ops() if not op.endswith("kda")}
    assert all(row["error"] <= row["bound"] for row in found["kernels"] if row["state"] == CHECKED)
    assert {row["backend"] for row in found["kernels"] if row["state"] == NOT_SERVED} == {
        kernel.backend for kernel in registry.kernels() if not serves(kernel)
    }


def test_options_that_cannot_be_used():
    assert "dtypes: float32, bfloat16, float16" in str(run("--dtype", "int8").exception)
    assert "--device nowhere cannot be used" in str(run("--device", "nowhere").exception)


def test_a_wrong_kernel_fails(monkeypatch):
    eager = registry.get("gated_norm", "eager")
    wrong = dataclasses.replace(eager, backend="wrong", fn=lambda **call: 1.001 * eager.fn(**call))
    registry.register(wrong, before="eager")
    try:
        result = run("--model", TINY, "--dtype", "float32")
    finally:
        registry.unregister("gated_norm", "wrong")
    assert result.exit_code == 1
    assert "REFUSED" in result.output and "FAILED: 1 of" in result.output
    assert "wrong gated_norm float32 (4, 4, 32, 32): error 1.0e-03 of y" in result.output.replace("\n", " ")


# ------------------------------------------------------------------------------------------------------ child processes

# A child that answers, and dies, hangs or talks in its own way at the row of a dtype. It imports nothing of ours, so it
# is quick.
_CHILD = """
import json, os, signal, sys, time
for line in sys.stdin:
    row = json.loads(line)
    if row["dtype"] == "float16":
        {fate}
    print(json.dumps({{**row, **{finding}}}), flush=True)
"""
DTYPES = "float32", "float16", "bfloat16"


def examined(fate, seconds=60.0):
    wanted = [Row("chunk_gdn", "triton", dtype, (1, 1, 8, 8), ("a model",), "cpu") for dtype in DTYPES]
    done, finding = [], {"state": CHECKED, "error": 1e-7, "bound": 1e-5}
    child = [sys.executable, "-c", _CHILD.format(fate=fate, finding=finding)]
    found = list(children._group(wanted, done.append, child, seconds, children.Processes()))
    assert [finding.row for finding in found] == wanted and done == found
    assert [finding.state for finding in found] == [CHECKED, REFUSED, CHECKED]
    return found[1].reason


@pytest.mark.parametrize(
    ("fate", "reason", "kept"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended its process by SIGSEGV", True),
        ("os.abort()", "ended its process by SIGABRT", True),
        (
            "raise RuntimeError('CUDA error: an illegal memory access')",
            "with exit code 1: RuntimeError: CUDA error",
            True,
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended its process by SIGKILL", False),  # short of memory
        ("os.kill(os.getpid(), signal.SIGINT)", "ended its process ", False),
        ("raise MemoryError", "with exit code 1: MemoryError", False),
        ("sys.exit(3)", "ended its process with exit code 3", False),
    ],
)
def test_a_child_that_dies_costs_one_row(fate, reason, kept, folder):
    assert reason in examined(fate)
    refused = [json.loads(file.read_text())["refused"] for file in folder.glob("*.json")]  # other processes do not try
    assert len(refused) == kept and all(reason in sentence for sentence in refused)


def test_a_child_that_hangs_is_killed(folder):
    assert examined("time.sleep(600)", 5.0) == "did not end within 5 s" and not folder.exists()


def test_an_interrupt_ends_the_children_and_keeps_no_verdict(folder):
    """Ctrl-C goes to all processes of a terminal's session, so children have one of their own."""
    kernel = dataclasses.replace(registry.get("gated_norm", "eager"), backend="planted", checked=True)
    registry.register(kernel, before="eager")
    wanted = [Row("gated_norm", "planted", dtype, (1, 1, 8, 8), (), "cpu") for dtype in DTYPES]
    code = "import os; assert os.getsid(0) == os.getpid()" + _CHILD.format(
        fate="time.sleep(600)", finding={"state": CHECKED}
    )
    done = []

    def interrupt(finding):
        done.append(finding)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    start, before = time.perf_counter(), signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            children.examine_all(wanted, 1, interrupt, [sys.executable, "-c", code])
    finally:
        signal.signal(signal.SIGINT, before)
        registry.unregister("gated_norm", "planted")
    assert [finding.state for finding in done] == [CHECKED] and time.perf_counter() - start < 60
    assert not folder.exists()


def test_a_child_reads_rows_and_writes_findings():
    row = Row("gated_norm", "eager", "float32", (1, 1, 8, 8), ("a model",), "cpu")
    line = json.dumps(row.as_json()) + "\n"
    done = subprocess.run(children.COMMAND, input=2 * line, capture_output=True, text=True, check=True)
    found = [Finding.of_json(json.loads(line)) for line in done.stdout.splitlines()]
    assert [finding.row for finding in found] == [row, row] and all(finding.state == CHECKED for finding in found)


def test_rows_of_one_kernel_are_neighbours():
    found = [(row.op, row.backend) for row in rows((), DTYPES, "cpu")]
    assert len(set(found)) == len([a for a, b in zip(found, [None, *found]) if a != b])
    assert set(found) == {(kernel.op, kernel.backend) for kernel in registry.kernels()}


def test_verdicts_of_crashes_are_found_by_the_registry():
    row = Row("gated_norm", "triton", "float32", (1, 1, 8, 8), ("a model",), "cpu")
    children._died(row, -11, "ended its process by SIGSEGV")
    kept = verdicts.key(registry.get("gated_norm", "triton"), row.request, torch.device("cpu"))
    assert verdicts.load(kept).refused == "ended its process by SIGSEGV"


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["chunk_gdn", "chunk_kda", "step_gdn", "step_kda", "gated_norm", "prologue_kda"])
def test_every_batch_size_and_length_on_a_gpu(op):
    heads = (32, 32, 128, 128) if op != "chunk_gdn" and op != "step_gdn" else (16, 32, 128, 128)
    found = examine.examine(Row(op, "triton", "bfloat16", heads, ("a model",), "cuda"))
    assert found.state == CHECKED, found.reason
    assert found.launches == found.captured > 3 and found.usage["registers"] > 0
