"""Two reports side by side: what is a regression and what is not."""

import copy
import json

import pytest

from hf_gdn import cli
from hf_gdn.errors import UserError
from hf_gdn.eval import compare
from hf_gdn.eval.kernel_results import KernelRow, LayerRow
from hf_gdn.eval.records import as_dict, read
from hf_gdn.eval.results import SCHEMA, Report
from tests.eval.commands import PARITY, SPEED, invoke


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small real report."""
    folder = tmp_path_factory.mktemp("whole")
    assert invoke("report", "--model", "qwen3_next-tiny", *PARITY, *SPEED, "--quiet", "--output", folder).exit_code == 0
    return json.loads((folder / "report.json").read_text())


def verdicts(before, after, tolerance=0.05):
    return {change.name: change.verdict for change in changes(before, after, tolerance) if change.verdict}


def changes(before, after, tolerance):
    return compare.changes(read(Report, before), read(Report, after), tolerance)


def test_a_report_is_no_regression_of_itself(whole):
    assert verdicts(whole, whole) == {}
    assert all(change.ratio == 1 for change in changes(whole, whole, 0) if change.before)


def test_slower_faster_and_within_the_tolerance(whole):
    after = copy.deepcopy(whole)
    first, second, third, _ = after["results"][0]["speed"]["cells"]
    first["patched"]["ttft_ms"]["median"] *= 1.06
    second["patched"]["ttft_ms"]["median"] *= 1.04
    third["patched"]["tpot_ms"]["median"] *= 0.5
    first["speedup"]["decode"]["median"] *= 0.9
    first["patched"]["first_call_s"] *= 9  # not judged
    first["original"]["ttft_ms"]["median"] *= 9  # not ours
    assert verdicts(whole, after) == {
        "qwen3_next-tiny, eager, 1 × 8: ttft_ms": "REGRESSION",
        "qwen3_next-tiny, eager, 1 × 8: speed-up of decode": "REGRESSION",
        "qwen3_next-tiny, eager, 2 × 8: tpot_ms": "better",
    }
    assert "qwen3_next-tiny, eager, 1 × 16: ttft_ms" in verdicts(whole, after, 0.03)


def test_a_lost_verdict_and_what_is_gone(whole):
    after = copy.deepcopy(whole)
    result = after["results"][0]
    result["passed"] = False
    result["parity"]["comparisons"][1]["grade"] = "close"
    result["parity"]["comparisons"][4]["grade"] = "close"  # the original's own, decides nothing
    gone = result["speed"]["cells"].pop()
    found = verdicts(whole, after)
    assert found["qwen3_next-tiny: passed"] == "REGRESSION"
    assert found["qwen3_next-tiny, decode: same model"] == "REGRESSION"
    assert "qwen3_next-tiny, original: prefill-then-decode against one forward: same model" not in found
    assert found[f"qwen3_next-tiny, eager, {gone['batch']} × {gone['prompt']}: ttft_ms"] == "GONE"
    assert set(verdicts(after, whole).values()) == {"better", "new"}


def test_a_figure_that_became_nothing(whole):
    after = copy.deepcopy(whole)
    after["results"][0]["speed"]["cells"][0]["patched"]["ttft_ms"]["median"] = None
    assert verdicts(whole, after) == {"qwen3_next-tiny, eager, 1 × 8: ttft_ms": "GONE"}


def kernels(ms, passed=True):
    row = KernelRow("chunk_gdn", "s", 1, 2, "forward", "eager", ms=ms, passed=passed, extra_mib=1.0)
    return as_dict(Report(kernels=[row]))


def layers(ms, passed=True):
    side = LayerRow("s", "decode", 1, 1, "eager", ms=ms, budget=1e-5, passed=passed, speedup=ms and 2 / ms)
    return as_dict(Report(layers=[side, LayerRow("s", "decode", 1, 1, "original", ms=2.0)]))


def test_layers():
    slower = verdicts(layers(1.0), layers(1.2))
    assert slower == {
        "layer decode, s, 1 × 1, eager: ms": "REGRESSION",
        "layer decode, s, 1 × 1, eager: speedup": "REGRESSION",
    }
    assert set(verdicts(layers(1.0), layers(None, False)).values()) == {"GONE", "REGRESSION"}


def test_kernels():
    assert verdicts(kernels(1.0), kernels(1.2)) == {"chunk_gdn, s, 1 × 2, eager: ms": "REGRESSION"}
    wrong = verdicts(kernels(1.0), kernels(None, False))
    assert wrong == {"chunk_gdn, s, 1 × 2, eager: ms": "GONE", "chunk_gdn, s, 1 × 2, eager: passed": "REGRESSION"}


def test_the_command(whole, tmp_path):
    slower = copy.deepcopy(whole)
    for cell in slower["results"][0]["speed"]["cells"]:
        cell["patched"]["generate_tokens_s"]["median"] /= 2
    slower["machine"]["processor"] = "another"
    for name, found in (("a", whole), ("b", slower)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    assert invoke("compare", a, a).exit_code == 0
    result = invoke("compare", a, b)
    assert result.exit_code == 1 and "4 regressions beyond 5%" in result.output and "→ another" in result.output
    assert invoke("compare", a, b, "--tolerance", "0.6").exit_code == 0
    assert invoke("compare", b, a).exit_code == 0


def test_reports_that_cannot_be_compared(whole, tmp_path, monkeypatch, capsys):
    old, other, bad = tmp_path / "old.json", tmp_path / "other.json", tmp_path / "bad.json"
    old.write_text(json.dumps({**whole, "schema": 1}))
    other.write_text(json.dumps({**whole, "kind": "ppl"}))
    bad.write_text("[1")
    good = tmp_path / "good.json"
    good.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=f"has schema version 1; this hf_gdn reads version {SCHEMA}"):
        compare.main(str(old), str(good), 0.05)
    with pytest.raises(UserError, match="'report', .*of 'ppl'"):
        compare.main(str(good), str(other), 0.05)
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps({**whole, "results": [{"model": "x"}]}))
    with pytest.raises(UserError, match="is damaged: no 'name'"):
        compare.main(str(damaged), str(good), 0.05)
    with pytest.raises(UserError, match="cannot be read"):
        compare.main(str(bad), str(good), 0.05)
    monkeypatch.setattr("sys.argv", ["hf-gdn", "compare", str(tmp_path / "none.json"), str(good)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
