"""Training programs through hf-gdn run, as docs/ecosystem.md has them: the losses are those without hf_gdn."""

import json
import os
import re
import subprocess
import sys

import pytest

from hf_gdn.loading.models import ASSETS

RUN = ["-m", "hf_gdn", "run", "--summary", "--strict"]


def losses(folder, *words: str, patched: bool) -> list[float]:
    """The losses that a program prints, and whether layers were patched in it."""
    folders = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": folders}
    env["HF_DATASETS_CACHE"] = str(folder / "cache")
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("qwen3_next 3 layers; " in done.stderr) == patched
    return [float(value) for value in re.findall(r"'loss': '?([\d.]+)", done.stdout)]


@pytest.mark.extended
@pytest.mark.parametrize("launcher", [[], ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]])
def test_trl(launcher, tmp_path):
    pytest.importorskip("trl")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": "import os\nimport sys\n" * (1 + i % 5)}) for i in range(16)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    options = dict(
        model_name_or_path=ASSETS / "qwen3_next-tiny", dataset_name=tmp_path / "data", output_dir="out", max_steps=4,
        per_device_train_batch_size=2, logging_steps=1, save_strategy="no", report_to="none", dtype="float32",
        bf16=False, use_cpu=True,
    )  # fmt: skip
    program = [
        "-m",
        "trl.scripts.sft",
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]
    wanted = losses(tmp_path, *program, patched=False)
    found = losses(tmp_path, *launcher, *RUN, *program, patched=True)
    # Printed with four digits: each rounded by half a unit of the last at most, of losses below 10.
    assert len(found) == len(wanted) == 4 and 1 < wanted[0] < 10
    assert all(abs(a - b) <= 1e-3 for a, b in zip(found, wanted)), (found, wanted)
