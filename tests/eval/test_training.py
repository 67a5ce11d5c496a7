"""hf-gdn train: a wrong gradient is found; training is resumed, shared by processes, packed, with adapters."""

import dataclasses
import json
import sys
import textwrap

import pytest
import torch

from hf_gdn.errors import UserError
from hf_gdn.eval import compare, training, training_batches, training_results, writers
from hf_gdn.eval.options import TrainOptions
from hf_gdn.eval.training_step import copies, group_of
from hf_gdn.loading.models import Loaded, Source
from tests import tiny_models as tiny
from tests.eval.commands import invoke, launch
from tests.eval.planted import OPS, backend

SMALL = ("--model", "qwen3_next-tiny", "--steps", "3", "--batch", "2", "--context", "32", "--lr", "1e-3", "--text")
TEXT = textwrap.__file__


@pytest.fixture
def command(tmp_path):
    """Runs the command into a folder; returns exit code, output and report."""

    def run(*arguments, folder="out"):
        done = invoke("train", *SMALL, TEXT, *arguments, "--output", tmp_path / folder)
        path = tmp_path / folder / "report.json"
        return done.exit_code, done.output, json.loads(path.read_text()) if path.exists() else None

    return run


def training_of(report):
    (result,) = report["results"]
    return result["training"]


def test_a_training_is_the_same(command, tmp_path):
    code, printed, report = command()
    assert code == 0 and "qwen3_next-tiny trains the same" in " ".join(printed.split())
    assert report["kind"] == "train" and report["passed"]
    found = training_of(report)
    assert found["grade"] == "same" and found["steps"] == len(found["original"]["losses"]) == 3
    assert found["original"]["losses"][2] != found["original"]["losses"][0]
    assert found["patched"]["ppl_after"] != found["patched"]["ppl_before"]
    assert sum(group["parameters"] for group in found["groups"]) == found["trained"] == 1_254_584
    assert all(group["error_before"] < 1e-4 for group in found["groups"])
    assert found["patched"]["peak_mib"] > 0 and found["speedup"]["low"] > 0
    kernels = report["results"][0]["kernels"]
    assert "chunk_gdn: eager, backward_gdn: eager" in kernels.values()
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(writers.FILES)
    assert "training,step 3,patched,loss," in (tmp_path / "out" / "report.csv").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 1 and "losses of the two trainings" in page
    path = str(tmp_path / "out" / "report.json")
    assert "qwen3_next-tiny, training: step_ms" in dict(compare.figures(compare.load(path)))


def wrong(op, change):
    """The eager kernel of `op` with its results changed."""

    def make(fn):
        return lambda *inputs, **options: change(*fn(*inputs, **options))

    return backend("wrong", make, ops=(op,)), backend("wrong", lambda fn: fn, ops=tuple(o for o in OPS if o != op))


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda q, k, v, g, *rest: (q, k, v, 0 * g, *rest), "dt_bias"),  # no gradient of the decay
        (lambda q, k, v, g, beta, *rest: (q, k, v, g, 1.01 * beta, *rest), "in_proj_ba"),
        (lambda q, k, v, g, beta, *rest: (q, k.roll(1, 1), v, g, beta, *rest), "gradient of"),
    ],
)
def test_a_wrong_gradient_is_found(command, change, complaint):
    planted, rest = wrong("backward_gdn", change)
    with planted, rest:
        code, printed, report = command("--backend", "wrong")
    assert code == 1 and "FAILED" in printed
    found = training_of(report)
    assert found["grade"] in ("close", "different") and complaint in found["why"], found["why"]


def test_nan_is_found(command):
    planted, rest = wrong("backward_gdn", lambda q, *rest: (q * float("nan"), *rest))
    with planted, rest:
        code, _, report = command("--backend", "wrong", "--steps", "1")
    assert code == 1 and training_of(report)["grade"] == "not finite"


def test_one_window_of_many_does_not_decide():
    """An expert that flips moves one; rounding moves the others by less than the bound."""
    made = training_results.Trained([2.0], [1.0], [1.0] * 8, 9.0, 9.0, None, 1.0, 1.0)
    group = training_results.ParameterGroup("x", 1, 1.0, 0.0, 0.0, 0.0)
    for moved, expected in (([1.005] + [1.0] * 7, "same"), ([1.005] * 5 + [1.0] * 3, "different")):
        bounds = {"gradient": 1e-3, "loss": 1e-4, "ppl_ratio": 1e-4}
        other = dataclasses.replace(made, held_out_after=moved)
        assert training.grade(made, other, [group], "float32", bounds).grade == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ("--packed", "--steps", "2"),
        ("--lora", "4", "--checkpointing", "--steps", "2"),
        ("--dtype", "bfloat16", "--steps", "1", "--context", "256", "--lr", "1e-4"),
        pytest.param(("--model", "kimi_linear-tiny", "--packed", "--lora", "2"), marks=pytest.mark.extended),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_ways_of_training(command, arguments):
    code, printed, report = command(*arguments)
    assert code == 0, printed
    found = training_of(report)
    if "--lora" in arguments:
        assert found["lora"] and found["trained"] < 100_000
        assert all("lora" in group["name"] for group in found["groups"])


def test_an_interrupted_training_goes_on(command, monkeypatch):
    """With the state of the last step kept, or none; either way the result is that of a run in one go."""
    *_, whole = command()
    step, save_every = training._Run.step, training.SAVE_EVERY
    for keep in (0.0, save_every):
        monkeypatch.setattr(training, "SAVE_EVERY", keep)
        seen = []

        def interrupted(run, number, seen=seen):
            seen.append(number)
            if seen == [0, 1]:
                raise KeyboardInterrupt
            return step(run, number)

        monkeypatch.setattr(training._Run, "step", interrupted)
        assert command(folder=f"cut-{keep}")[0] == 130
        code, _, report = command("--resume", folder=f"cut-{keep}")
        assert code == 0 and seen == ([0, 1, 1, 2] if keep == 0 else [0, 1, 0, 1, 2])
        for side in ("original", "patched"):
            for what in ("losses", "norms", "ppl_before", "ppl_after"):
                assert training_of(report)[side][what] == training_of(whole)[side][what]


def test_two_processes_train_as_one(tmp_path, command):
    *_, one = command("--device", "cpu", "--packed")
    arguments = ["train", *SMALL, TEXT, "--device", "cpu", "--packed", "--output", str(tmp_path / "two")]
    code, out, err = launch(tmp_path, *arguments)
    assert code == 0 and out.count("PASSED") == 1, err
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert two["processes"] == 2
    for side in ("original", "patched"):
        mine, theirs = training_of(one)[side], training_of(two)[side]
        for what in ("losses", "norms"):
            # Sums in another order, carried on by AdamW.
            assert mine[what] == pytest.approx(theirs[what], rel=1e-4)
        assert mine["ppl_after"] == pytest.approx(theirs["ppl_after"], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- batches


def batches(**options):
    return training_batches.of_text(torch.arange(2000), "numbers", TrainOptions(**{"context": 64, **options}))


def test_held_out_is_not_trained_on():
    found = batches(steps=3, batch=4)
    assert found.steps.shape == (3, 4, 64)
    assert found.steps.max() < found.held_out.min() and len(found.held_out) == 4
    assert len({int(window[0]) for window in found.steps.flatten(0, 1)}) == 12  # none twice
    again = batches(steps=20, batch=4).steps.flatten(0, 1)[:, 0]
    assert again.unique(return_counts=True)[1].max() - again.unique(return_counts=True)[1].min() <= 1
    assert torch.equal(found.steps, batches(steps=3, batch=4).steps)
    assert not torch.equal(found.steps, batches(steps=3, batch=4, seed=1).steps)


def test_documents_are_the_windows_cut():
    found = batches(steps=2, batch=3, packed=True)
    documents = found.documents(1)
    assert torch.equal(torch.cat(documents), found.steps[1].flatten()) and len(documents) > 3
    assert min(map(len, documents)) >= 64 // 8
    halves = [found.documents(1, shard, 3) for shard in range(3)]
    assert [document.tolist() for part in halves for document in part] == [d.tolist() for d in documents]


def test_packed_and_padded_score_the_same_tokens():
    documents = batches(steps=2, batch=3, packed=True).documents(0)
    padded = training_batches.padded(documents, torch.device("cpu"))
    packed = training_batches.packed(documents, torch.device("cpu"))
    for inputs in (padded, packed):
        scored = inputs.labels != training_batches.NOT_SCORED
        assert int(scored.sum()) == training_batches.scored(documents)
        assert torch.equal(inputs.labels[scored], inputs.arguments["input_ids"][scored] + 1)  # numbers in order
    assert "attention_mask" in padded.arguments and packed.arguments["position_ids"].shape == (1, 192)
    assert "attention_mask" not in training_batches.padded([torch.arange(9)] * 2, torch.device("cpu")).arguments


# ---------------------------------------------------------------------------------------------------------- bad input


def test_adapters_share_what_is_frozen():
    model = tiny.model("qwen3_next")
    loaded = Loaded(Source("x"), model, None, "float32")
    both = copies(loaded, TrainOptions(lora=2))
    for (name, a), b in zip(both["original"].model.named_parameters(), both["patched"].model.parameters()):
        assert (a is b) == (name not in both["original"].trained)
    assert group_of("base_model.model.model.layers.11.mlp.experts.3.w") == "model.layers.*.mlp.experts.*.w"


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("--dtype", "float16"), "float32 or bfloat16: AdamW's moments underflow in float16"),
        (("--context", "99999"), "--context is 99999 tokens; qwen3_next-tiny takes 4096 at most"),
        (("--context", "4096"), "tokens; training takes --context for a window and as many held out, 8192"),
        (("--lr", "0"), "--lr must be above 0 and finite, got 0"),
        (("--lr", "inf"), "--lr must be above 0 and finite, got inf"),
        (("--seed", "999999999999999999999"), "--seed must be at most 4294967295, got 999999999999999999999"),
        (("--tolerance", "loss=nan"), "--tolerance loss=nan: a bound must be at least 0, got nan"),
        (("--tolerance", "gradient=-1"), "--tolerance gradient=-1: a bound must be at least 0, got -1"),
        (("--tolerance", "kl_mean=1"), "no bound 'kl_mean'; bounds: gradient, loss, ppl_ratio"),
        (("--tolerance", "loss=small"), "expected NAME=NUMBER, e.g. loss=1e-3"),
    ],
)
def test_what_cannot_be_used(arguments, text, tmp_path):
    done = invoke("train", *SMALL, TEXT, *arguments, "--output", tmp_path)
    assert isinstance(done.exception, UserError) and text in str(done.exception), done.exception
    assert not (tmp_path / "report.json").exists()


def test_checkpointing_warns_of_nothing(recwarn):
    loaded = Loaded(Source("x"), tiny.model("qwen3_next"), None, "float32")
    copies(loaded, TrainOptions(checkpointing=True))
    assert [str(warning.message) for warning in recwarn] == []


def test_adapters_need_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="--lora needs the peft package: pip install peft"):
        training.check(TrainOptions(lora=4))


def test_a_batch_for_every_process():
    class Two:
        count, index, main = 2, 0, True

    loaded = Loaded(Source("x"), None, None, "float32")
    work = type("Work", (), {"processes": Two()})()
    with pytest.raises(UserError, match="--batch must be a multiple of the 2 processes, got 3"):
        training.measure(loaded, torch.arange(9), "text", TrainOptions(batch=3), "auto", work)
