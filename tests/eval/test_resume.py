"""Finished rows survive an interruption, and rows of another run are refused."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from hf_gdn.errors import UserError
from hf_gdn.eval.distributed import Processes
from hf_gdn.eval.resume import Journal, Work, prepare, put

JOB = {"context": 512, "models": ["a"]}


def work(journal, prefix=""):
    return Work(Processes(), journal, prefix=prefix)


def test_rows_come_back_as_they_were(tmp_path):
    journal = Journal(tmp_path, JOB)
    row = {"x": torch.tensor([0.1, float("nan")], dtype=torch.float64), "n": 3, "names": ["é", None], "f": 0.1}
    journal.add("one", row)
    again = Journal(tmp_path, JOB, resume=True)
    assert "one" in again and "two" not in again
    found = again["one"]
    assert torch.equal(found.pop("x").nan_to_num(7.0), row.pop("x").nan_to_num(7.0)) and found == row
    assert not list(journal.folder.glob(".*"))  # nothing half written
    again.remove()
    assert not journal.folder.exists() and "one" not in again


def test_only_missing_rows_are_computed(tmp_path):
    made = []

    def compute(key):
        made.append(key)
        if key == "c" and len(made) == 3:
            raise KeyboardInterrupt
        return {"key": key}

    with pytest.raises(KeyboardInterrupt):
        work(Journal(tmp_path, JOB), "0-").fill("abcd", compute)
    rows = work(Journal(tmp_path, JOB, resume=True), "0-").fill("abcd", compute)
    assert made == ["a", "b", "c", "c", "d"] and [row["key"] for row in rows] == list("abcd")
    work(Journal(tmp_path, JOB, resume=True), "1-").fill("a", compute)
    assert made[-1] == "a"  # another model's row


def test_without_resume_rows_are_made_anew(tmp_path):
    Journal(tmp_path, JOB).add("old", {})
    journal = Journal(tmp_path, JOB)
    assert "old" not in journal and (journal.folder / "old.safetensors").exists()  # kept until there is a new one
    journal.add("new", {})
    assert [path.stem for path in journal.folder.glob("*.safetensors")] == ["new"]


def test_rows_of_another_run_are_refused(tmp_path):
    Journal(tmp_path, JOB).add("a", {})
    with pytest.raises(UserError, match='holds another run: context was 512, is 64; device was null, is "cpu"'):
        Journal(tmp_path, {"context": 64, "models": ["a"], "device": "cpu"}, resume=True)
    (tmp_path / "unfinished" / "job.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        Journal(tmp_path, JOB, resume=True)
    assert (tmp_path / "unfinished" / "a.safetensors").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def halfway(place):
        place.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"report.json' cannot be written: No space left on device"):
        put(path, halfway)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/under"):
        with pytest.raises(UserError, match=f"output folder '{tmp_path}/{name}' cannot be written"):
            prepare(str(tmp_path / name))


def test_interrupted_and_resumed(tmp_path):
    """Ctrl-C in the middle of a real run; the second one goes on, and ends as an uninterrupted one would."""
    command = [
        sys.executable,
        "-m",
        "hf_gdn",
        "ppl",
        "--context",
        "24",
        "--windows",
        "12",
        "--batch-size",
        "1",
        "--mode",
        "decode",
        "--model",
        "kimi_linear-tiny",
        "--quiet",
        "--output",
    ]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
    process = subprocess.Popen([*command, str(cut)], stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while len(list(cut.glob("unfinished/*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted; --resume" in error and "Traceback" not in error, error
    done = {path.name: os.stat(path).st_mtime_ns for path in cut.glob("unfinished/*.safetensors")}
    assert 3 <= len(done) < 12 and not (cut / "report.json").exists()

    other = subprocess.run([*command, str(cut), "--resume", "--stride", "9"], capture_output=True, text=True)
    assert other.returncode == 2 and "stride was null, is 9" in other.stderr
    assert {path.name for path in cut.glob("unfinished/*.safetensors")} == set(done)

    subprocess.run([*command, str(cut), "--resume"], check=True, capture_output=True)
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    assert not (cut / "unfinished").exists()
    found = [json.loads((folder / "report.json").read_text())["results"][0]["parity"] for folder in (cut, whole)]
    assert found[0] == found[1]
