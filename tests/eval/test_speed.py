"""Timing: turns alternate, tokens are compared, and a fast wrong answer does not count."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import CompileConfig, PreTrainedModel

import hf_gdn
from hf_gdn import cuda_graphs, registry
from hf_gdn.errors import UserError
from hf_gdn.eval import generation, lookup, speed
from hf_gdn.eval.distributed import Processes
from hf_gdn.eval.options import SpeedOptions
from hf_gdn.eval.results import TokenMatch
from hf_gdn.eval.resume import Journal, Work
from hf_gdn.eval.spreads import Spread
from hf_gdn.loading import models, texts
from tests import tiny_models as tiny
from tests.fake_cuda_graph import Tape

CPU = torch.device("cpu")


def call(tokens, first=1.0, between=(0.5, 0.5), peak=10.0):
    return generation.Call(torch.tensor(tokens), first, between, first + sum(between), peak)


def test_turns_alternate():
    order = []

    def run(name):
        def one(turn):
            order.append((name, turn))
            return call([[1]])

        return one

    steps = []
    calls = speed.in_turns({"a": run("a"), "b": run("b")}, 1, 2, steps.append)
    assert order == [(name, turn) for turn in (0, 0, 1) for name in "ab"]
    assert len(calls["a"]) == 3 and sum(steps) == 6


def test_calls_with_the_same_prompt_are_compared():
    same = [call([[1]]), call([[1]]), call([[2]]), call([[1]]), call([[2]])]  # a warm-up, two prompts in turns
    assert speed._repeated(same, 1, 2)
    assert not speed._repeated(same, 1, 1) and not speed._repeated([call([[3]]), *same[1:]], 1, 2)


def test_figures_by_hand():
    cell = speed.Cell(2, 10, 3, "eager")
    cold = call([[1, 2, 3]] * 2, first=9.0, peak=99.0)
    calls = [cold, call([[1, 2, 3]] * 2, 1.0, (0.5, 0.3)), call([[1, 2, 3]] * 2, 2.0, (0.1, 0.1), 20.0)]
    found = speed.summarize(cell, calls, 1)
    assert found.ttft_ms == Spread(1500.0, 1000.0, 2000.0)
    assert found.tpot_ms.median == pytest.approx(200.0) and found.tpot_ms.p90 == pytest.approx(600.0)
    assert found.prefill_tokens_s.median == pytest.approx((20 / 1 + 20 / 2) / 2)
    assert found.decode_tokens_s.high == pytest.approx(2 * 2 / 0.2)
    assert found.generate_tokens_s.low == pytest.approx(6 / 2.2)
    assert found.peak_mib == 20.0 and found.first_call_s == 10.0
    ratios = speed._ratios([call([[1]], 2.0, (1.0,))], [call([[1]], 1.0, (0.25,))])
    assert ratios.prefill.median == 2 and ratios.decode.median == 4
    assert ratios.generate.median == 3 / 1.25


def test_times_are_those_of_generate(family):
    model = tiny.model(family)
    ids, _ = tiny.batch(2, 20)
    found = generation.generate(model, ids, 5)
    assert found.tokens.shape == (2, 5) and len(found.between) == 4 and min(found.between) > 0
    assert 0 < found.first < found.seconds and found.first + sum(found.between) <= found.seconds
    assert found.peak_mib is None or found.peak_mib > 50
    model.generation_config.eos_token_id = None  # nothing ends a text early
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    assert torch.equal(found.tokens, wanted[:, 20:])


class Fixed(torch.nn.Module):
    """Always the same logits."""

    device = CPU

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))


def test_tokens_same_tied_and_other():
    prompt, tokens = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1, 2, 3], [3, 2, 1]])
    eps = torch.finfo(torch.float32).eps
    model = Fixed(1.0, 1.0 + 8 * eps, 0.0, 1.0)
    assert generation.compare_tokens(model, prompt, tokens, tokens, "float32") == TokenMatch("same")
    tied = torch.tensor([[1, 2, 3], [1, 2, 1]])
    found = generation.compare_tokens(model, prompt, tokens, tied, "float32")
    assert found == TokenMatch("tie", 1, 0, pytest.approx(8 * eps))
    other = torch.tensor([[1, 0, 3], [1, 2, 1]])
    found = generation.compare_tokens(model, prompt, tokens, other, "float32")
    assert found == TokenMatch("other", 0, 1, 1.0)
    assert generation.compare_tokens(Fixed(1.0, 1.01, 0.99, 1.0), prompt, tokens, other, "bfloat16").verdict == "tie"


def run(options, backend="auto", folder=None, source=None, ids=None):
    loaded = models.load(source or models.Source("qwen3_next-tiny", random=True), CPU, torch.float32)
    return speed.measure(loaded, ids, options, backend, Work(Processes(), Journal(folder, {})))


def test_every_combination_is_a_cell(tmp_path):
    options = SpeedOptions((1, 2), (8, 16), 3, 1, ("eager", "static"))
    found = run(options, folder=tmp_path)
    cells = [(cell.variant, cell.batch, cell.prompt) for cell in found.cells]
    assert cells == [(v, b, p) for v in ("eager", "static") for b in (1, 2) for p in (8, 16)]
    assert found.passed
    for cell in found.cells:
        assert cell.counts and cell.repeatable and cell.tokens == TokenMatch("same")
        assert list(cell.sides()) == ["original", "patched"]
        for side in cell.sides().values():
            for name in ("ttft_ms", "tpot_ms", "prefill_tokens_s", "decode_tokens_s", "generate_tokens_s"):
                value = getattr(side, name)
                assert 0 < value.low <= value.median <= value.high
            assert side.tpot_ms.p90 > 0 and side.first_call_s > 0


def test_compiled_runs_both_sides(tmp_path, monkeypatch):
    seen = []

    def backend(graph, example):
        seen.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    make = {"cache_implementation": "static", "compile_config": config}
    monkeypatch.setitem(speed.VARIANTS, "compile", speed.Variant(lambda: make, 1))
    source = models.Source("kimi_linear-tiny", random=True)
    found = run(SpeedOptions((1,), (8,), 4, 1, ("compile",)), folder=tmp_path, source=source)
    assert found.passed and len(seen) == 2  # one graph for the original, one for the patched model


def test_graph_captures_once_in_all_turns(tmp_path, monkeypatch, without_numba):
    monkeypatch.setitem(cuda_graphs.CAPTURES, "cpu", Tape)
    monkeypatch.setattr(Tape, "recorded", 0)
    monkeypatch.setattr(Tape, "replayed", 0)
    asked = []

    def compiled(self, config):
        asked.append(config)
        return self.__call__

    monkeypatch.setattr(PreTrainedModel, "get_compiled_call", compiled)
    source = models.Source("kimi_linear-tiny", random=True)
    found = run(SpeedOptions((1,), (8,), 6, 2, ("graph",)), folder=tmp_path, source=source)
    assert found.passed and len(asked) == 4  # the original's calls, two to warm up and two timed
    assert (Tape.recorded, Tape.replayed) == (1, 4 + 3 * 5)


@pytest.fixture
def wrong():
    """Kernels that return zeros."""
    for op in tiny.DELTA_RULES:
        eager = registry.get(op, "eager")

        def fn(*inputs, eager=eager, **kwargs):
            o, state = eager.fn(*inputs, **kwargs)
            return torch.zeros_like(o), state

        registry.register(dataclasses.replace(eager, backend="wrong", fn=fn))
    yield "wrong"
    for op in tiny.DELTA_RULES:
        registry.unregister(op, "wrong")


def test_a_fast_wrong_answer_does_not_count(wrong, tmp_path):
    loaded = models.Source("qwen3_next-tiny")
    found = run(SpeedOptions((1,), (32,), 16, 1), wrong, tmp_path, loaded)
    (cell,) = found.cells
    assert not found.passed and not cell.counts and cell.tokens.verdict == "other"
    assert math.isfinite(cell.tokens.gap)


def test_what_cannot_be_compiled_is_said(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory: 7 GiB wanted")

    monkeypatch.setattr(speed, "generate", fails)
    found = run(SpeedOptions((1,), (8,), 4, 1), folder=tmp_path)
    assert not found.passed and found.cells[0].failed == "OutOfMemoryError: out of memory: 7 GiB wanted"


@pytest.mark.parametrize("name", models.embedded())
def test_drafts_on_all_kinds_of_prompts(name, tmp_path):
    loaded = models.load(models.Source(name), CPU, torch.float32)
    ids = texts.tokenize(loaded.tokenizer, texts.embedded())
    options = SpeedOptions((1, 2), (24,), 8, 1, ("eager", "lookup", "mtp"))
    found = speed.measure(loaded, ids, options, "auto", Work(Processes(), Journal(tmp_path, {})))
    kinds = [f"lookup-{kind}" for kind in lookup.PROMPTS]
    if name == "qwen3_next-tiny":  # the other has no head
        kinds += ["mtp-text", "mtp-refused"]
    assert [(cell.variant, cell.batch) for cell in found.cells] == [
        ("eager", 1),
        ("eager", 2),
        *((kind, 1) for kind in kinds),
    ]
    for cell in found.cells:
        assert cell.failed is None and cell.counts and cell.tokens.verdict in ("same", "tie")
        assert cell.patched.decode_tokens_s.low > 0 and cell.speedup.generate.median > 0
        assert (cell.drafts is None) == (cell.variant == "eager")
    if name == "qwen3_next-tiny":
        text, refused = (cell.drafts for cell in found.cells[-2:])
        assert 0 < text.accepted <= text.drafted and refused.drafted > 0 and refused.accepted < text.accepted


def test_mtp_alone_needs_a_head(tmp_path):
    loaded = models.load(models.Source("kimi_linear-tiny"), CPU, torch.float32)
    with pytest.raises(UserError, match="kimi_linear: its checkpoints have no such head"):
        speed.measure(loaded, None, SpeedOptions(variants=("mtp",)), "auto", Work(Processes(), Journal(tmp_path, {})))


def test_tokens_that_leave_together_share_their_time():
    """As accepted drafts do."""
    model = tiny.model("qwen3_next")
    ids = tiny.batch(1, 4)[0].repeat(1, 6)
    with hf_gdn.patched():
        found = generation.generate(model, ids, 12, prompt_lookup_num_tokens=3)
    assert found.tokens.shape == (1, 12) and len(found.between) == 11 and found.first > 0
    assert found.first + sum(found.between) <= found.seconds


def test_prompts_of_lookup():
    text = torch.arange(10)[None]
    assert lookup.prompt("repetitive", text, 50).tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]
    assert torch.equal(lookup.prompt("text", text, 50), text) and torch.equal(lookup.prompt("refused", text, 50), text)
    assert lookup.prompt("random", text, 50).shape == (1, 10)


def test_defaults_follow_the_device():
    assert [cell.key for cell in speed.plan(SpeedOptions(), CPU)] == [
        "b1-p128-n64-eager",
        "b1-p512-n64-eager",
        "b4-p128-n64-eager",
        "b4-p512-n64-eager",
    ]
    assert speed.plan(SpeedOptions(), torch.device("cuda"))[-1] == speed.Cell(8, 4096, 128, "eager")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            SpeedOptions(variants=("fast",)),
            "--variant fast is not known; variants: eager, static, compile, graph",
        ),
        (SpeedOptions(variants=("graph",)), "--variant graph needs a CUDA device; the model is on cpu"),
        (SpeedOptions(variants=("lookup",), batch=(4, 8)), "--variant lookup generates one sequence at a time; --b"),
        (SpeedOptions(batch=(0,)), "--batch, --prompt and --rounds must be at least 1"),
        (SpeedOptions(rounds=0), "--rounds must be at least 1"),
        (SpeedOptions(new_tokens=1), "--new-tokens at least 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        speed.plan(options, CPU)


def test_prompts_longer_than_the_model(tmp_path):
    with pytest.raises(UserError, match="prompt and new tokens together is 4098 tokens; qwen3_next-tiny .* takes 4096"):
        run(SpeedOptions((1,), (4090,), 8), folder=tmp_path)


def test_prompts_are_stretches_of_the_text():
    loaded = SimpleNamespace(config=SimpleNamespace(vocab_size=50))
    assert speed.prompts(loaded, torch.arange(10), 2, 6).tolist() == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 0]]
    random = speed.prompts(loaded, None, 3, 7)
    assert random.shape == (3, 7) and torch.equal(random, speed.prompts(loaded, None, 3, 7))
