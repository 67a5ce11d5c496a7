"""lm-evaluation-harness through hf-gdn run, offline: the scores and answers are those without hf_gdn, in fp32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_gdn.loading.models import ASSETS
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER

pytest.importorskip("lm_eval")
SNIPPETS = [
    ("import os\nimport", " sys", " 17"),
    ("def __init__(self", ", name):", " import import"),
    ("class A:\n    def f(self):\n        return", " self", " class"),
    ("for name in names:\n    if name", " in", " def"),
    ("x", " = 1", " else"),
    ("try:\n    import json\nexcept ImportError:\n   ", " pass", " while"),
    ("    # The", " name", " %%"),
    ("raise ValueError(", "'", " with"),
]
CHOICE = """task: gdn_choice
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """task: gdn_write
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[0]}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text, "choices": [right, wrong], "label": 0} for text, right, wrong in SNIPPETS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "data.jsonl"))
    return folder


def samples(tasks: Path, output: Path, batch: int, patched: bool) -> list:
    """What lm_eval notes of each question: log-likelihoods, answers and scores, unrounded."""
    launcher = ["-m", "hf_gdn", "run", "--summary", "--strict"] if patched else []
    given = f"pretrained={ASSETS / 'qwen3_next-tiny'},dtype=float32"
    command = [sys.executable, *launcher, "-m", "lm_eval", "run", "--model", "hf", "--model_args", given]
    command += ["--include_path", str(tasks), "--tasks", "gdn_choice,gdn_write", "--batch_size", str(batch)]
    command += ["--device", "cpu", "--output_path", str(output), "--log_samples"]
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"), "1")
    folders = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **offline, "PYTHONPATH": folders}
    env["HF_DATASETS_CACHE"] = str(tasks / "cache")
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tasks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("qwen3_next 3 layers; " in done.stderr) == patched
    found = []
    for file in sorted(output.rglob("samples_*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows.sort(key=lambda row: row["doc_id"])
        found += [(row["doc"]["text"], row["resps"], row.get("acc"), row.get("exact_match")) for row in rows]
    assert len(found) == 2 * len(SNIPPETS)
    return found


def log_likelihoods(rows: list) -> torch.Tensor:
    """``[N]``, in nats."""
    return torch.tensor([float(value) for _, answers, acc, _ in rows if acc is not None for ((value, _),) in answers])


@pytest.mark.extended
def test_scores_are_those_without_hf_gdn(tasks, tmp_path):
    """With a batch of eight the texts are padded, on the left to be continued and on the right to be scored."""
    wanted = samples(tasks, tmp_path / "original", 1, patched=False)
    for batch in (1, 8):
        found = samples(tasks, tmp_path / f"patched{batch}", batch, patched=True)
        assert [row[2:] for row in found] == [row[2:] for row in wanted]  # scores
        written = [[row[1] for row in rows if row[2] is None] for rows in (found, wanted)]
        assert written[0] == written[1] and len(written[0]) == len(SNIPPETS)
        assert_close("log-likelihoods", log_likelihoods(found), log_likelihoods(wanted), LAYER)
