"""Two processes on a CPU: the same result as one, one voice, and one failure stops both."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from hf_gdn.errors import UserError
from hf_gdn.eval.distributed import Processes
from tests import tiny_models as tiny
from tests.eval.commands import launch

PPL = ["ppl", "--mode", "prefill,mixed", "--context", "64", "--windows", "7", "--batch-size", "2", "--device", "cpu"]


def parity(folder):
    found = json.loads((folder / "report.json").read_text())
    return found, [result["parity"]["comparisons"] for result in found["results"]]


def test_two_processes_equal_one(tmp_path):
    code, out, err = launch(tmp_path, *PPL, "--output", str(tmp_path / "two"))
    assert code == 0, err
    assert out.count("PASSED") == 1 and out.count("wrote") == 1
    warns = tiny.ON_A_CPU[0] == "eager"  # which is said once, not by every process
    assert err.count("hf_gdn runs on") == int(warns)
    environment = dict(os.environ)
    command = [sys.executable, "-m", "hf_gdn", *PPL, "--quiet", "--output", str(tmp_path / "one")]
    subprocess.run(command, check=True, env=environment)
    (one, a), (two, b) = parity(tmp_path / "one"), parity(tmp_path / "two")
    assert one["processes"] == 1 and two["processes"] == 2 and one["passed"] and two["passed"]
    for mine, theirs in zip(itertools.chain(*a), itertools.chain(*b)):
        assert mine["name"] == theirs["name"]
        for name, value in mine["statistics"].items():
            if isinstance(value, dict):
                assert theirs["statistics"][name]["value"] == pytest.approx(value["value"], rel=1e-6, abs=1e-9), name
            else:
                assert theirs["statistics"][name] == value


def test_tensor_parallel_is_the_same_model(tmp_path):
    arguments = ["--model", "kimi_linear-tiny", "--output", str(tmp_path / "tp"), "--tp", "--quiet"]
    code, out, err = launch(tmp_path, *PPL, *arguments)
    assert code == 0 and "PASSED" in out, err
    found, (rows,) = parity(tmp_path / "tp")
    assert found["results"][0]["tensor_parallel"] and all(row["grade"] == "same" for row in rows)


FAILING = """
import os, sys
from hf_gdn import cli
from hf_gdn.errors import UserError
from hf_gdn.eval import parity
compare = parity._compare
def fails(*arguments):
    if os.environ["RANK"] == "1":
        raise {}("planted")
    return compare(*arguments)
parity._compare = fails
cli.main()
"""


@pytest.mark.parametrize("kind", ["RuntimeError", pytest.param("UserError", marks=pytest.mark.extended)])
def test_a_failure_in_one_stops_both(kind, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(kind))
    code, out, err = launch(tmp_path, *PPL, "--output", str(tmp_path / "out"), script=script)
    assert code != 0 and "PASSED" not in out
    mine = [line for line in err.splitlines() if line.startswith("hf-gdn: ")]
    assert mine == ["hf-gdn: process 1 of 2 failed:" if kind == "RuntimeError" else "hf-gdn: process 1 of 2: planted"]
    assert ("RuntimeError: planted" in err) == (kind == "RuntimeError")
    assert not (tmp_path / "out" / "report.json").exists()


def test_one_process():
    ranks = Processes()
    assert ranks.main and (ranks.index, ranks.count, ranks.shard, ranks.shards) == (0, 1, 0, 1)
    assert ranks.together(lambda: 7) == [7] and ranks.each(lambda: 7) == ranks.from_main(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        ranks.each(lambda: 1 / 0)
    ranks.close()
    with pytest.raises(UserError, match="--tp needs several processes"):
        Processes(tensor_parallel=True)
