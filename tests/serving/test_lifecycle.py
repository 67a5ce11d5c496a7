"""What happens to requests: pieces of prompts, preemption, cancellation, forks, offloading; slots never leak."""

import random
import time
from unittest import mock

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

import hf_gdn
from hf_gdn.testing.tolerances import LOG_PROBABILITY
from tests import tiny_models as tiny
from tests.serving import runs

pytestmark = runs.needs_seams


def run_randomly(model, requests: int, seed: int, **changes) -> tuple[int, int]:
    """Requests of 1 to 300 tokens that arrive and are cancelled at random. Returns the finished and the preempted."""
    chance, preempted = random.Random(seed), 0
    lengths = [min(300, 1 + int(chance.expovariate(1 / 60))) for _ in range(requests)]
    limits = [chance.randint(1, 20) for _ in range(requests)]
    cancelled, sent = set(), []
    from transformers.generation.continuous_batching.requests import RequestState

    original = RequestState.create_equivalent_initial_request

    def count(self):
        nonlocal preempted
        preempted += 1
        return original(self)

    def cancel(made):
        name = chance.choice(sent)
        cancelled.add(name)
        made.cancel_request(name)

    finished = {}
    with (
        mock.patch.object(RequestState, "create_equivalent_initial_request", count),
        runs.manager(model, **{**runs.TINY_POOL, **changes}) as made,
    ):
        for prompt, limit in zip(runs.prompts(lengths, seed), limits):
            sent.append(made.add_request(prompt, max_new_tokens=limit, eos_token_id=1))
            if chance.random() < 0.1:
                cancel(made)
            if chance.random() < 0.2:
                time.sleep(chance.random() / 50)
        until = time.monotonic() + 300
        while len(finished.keys() | cancelled) < requests and made.is_running() and time.monotonic() < until:
            out = made.get_result(timeout=0.2)
            if out is not None and out.is_finished():
                finished[out.request_id] = out
                if preempted and len(cancelled) < requests // 6 and chance.random() < 0.2:
                    cancel(made)
        fatal = made.background_thread_status.fatal_error
        cache = runs.cache_of(made)
    assert fatal is None, fatal
    assert finished.keys() | cancelled == set(sent)
    runs.assert_nothing_held(cache)
    for out in finished.values():
        runs.assert_greedy(model, out)
    return len(finished), preempted


@pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid"])
def test_random_requests_in_a_tiny_pool(family):
    model = tiny.model(family)
    hf_gdn.patch()
    finished, preempted = run_randomly(model, requests=30, seed=2)
    assert finished >= 20 and preempted > 0


@pytest.mark.extended
def test_a_thousand_random_requests_in_tiny_pools():
    model = tiny.model("qwen3_next")
    hf_gdn.patch()
    for seed in range(10):
        scheduler = ("fifo", "prefill_first")[seed % 2]
        finished, preempted = run_randomly(model, 100, 100 + seed, num_blocks=14 + seed, scheduler_type=scheduler)
        assert finished >= 80 and (preempted > 0 or seed > 5)


@pytest.mark.parametrize("size", [8, 17])
def test_prompts_are_read_in_pieces(size):
    model, prompts = tiny.model("qwen3_5"), runs.prompts((50, 3, 29))
    hf_gdn.patch()
    with runs.manager(model, max_batch_tokens=size, max_requests_per_batch=4) as made:
        ids = [made.add_request(prompt) for prompt in prompts]
        out = runs.results(made, ids)
    for request in ids:
        runs.assert_greedy(model, out[request])


def test_a_cancelled_request_gives_its_slot_back():
    model = tiny.model("qwen3_next")
    hf_gdn.patch()
    (prompt, other) = runs.prompts((40, 20))
    with runs.manager(model, **runs.TINY_POOL) as made:
        endless = made.add_request(prompt, max_new_tokens=250, streaming=True, eos_token_id=-1)
        while made.get_result(endless, timeout=0.1) is None:
            pass  # until it has begun
        made.cancel_request(endless)
        ids = [made.add_request(other)]
        runs.assert_greedy(model, runs.results(made, ids)[ids[0]])
        cache = runs.cache_of(made)
    runs.assert_nothing_held(cache)


def test_a_preempted_request_goes_on_when_all_active_ones_are_cancelled():
    model = tiny.model("qwen3_next")
    hf_gdn.patch()
    with runs.manager(model, num_blocks=9, max_requests_per_batch=8) as made:
        for prompt in runs.prompts((60, 40, 50, 30)):
            made.add_request(prompt, max_new_tokens=40, eos_token_id=-1)
        scheduler, preempted = made.batch_processor.scheduler, []
        while not preempted and made.is_running():
            with made.pause():
                if scheduler.block_new_requests:
                    preempted = list(scheduler.waiting_requests)
                    for request in scheduler.active_requests:
                        made.cancel_request(request)
        out = runs.results(made, preempted, seconds=30)
        cache = runs.cache_of(made)
    for request in preempted:
        runs.assert_greedy(model, out[request])
    runs.assert_nothing_held(cache)


@pytest.mark.parametrize("lengths", [(1, 7), (1, 1), (2, 7), (40, 7)], ids=str)
def test_several_answers_fork_the_states(lengths):
    """Four sampled answers that are each as likely as the model says; to a prompt of one token they are requests."""
    model, prompts = tiny.model("qwen3_next"), runs.prompts(lengths)
    hf_gdn.patch()
    sampled = GenerationConfig(
        max_new_tokens=8, do_sample=True, num_return_sequences=4, top_k=0, eos_token_id=-1, pad_token_id=0
    )
    out = model.generate_batch(
        prompts,
        generation_config=sampled,
        continuous_batching_config=runs.settings(return_logprobs=True, seed=3),
    )
    assert len(out) == 8 and len({tuple(made.generated_tokens) for made in out.values()}) > 4
    for made in out.values():
        with torch.no_grad():
            logits = model(torch.tensor([made.prompt_ids + made.generated_tokens])).logits[
                0, len(made.prompt_ids) - 1 :
            ]
        exact = logits[:-1].log_softmax(-1).gather(1, torch.tensor(made.generated_tokens)[:, None])[:, 0]
        assert (torch.tensor(made.logprobs) - exact).abs().max() < LOG_PROBABILITY


def test_offloaded_requests_come_back(monkeypatch):
    """Preempted requests are copied to the offload pool and back."""
    model, prompts = tiny.model("qwen3_next"), runs.prompts((100, 80, 120, 60, 90))
    hf_gdn.patch()
    runs.assert_offloaded_and_right(model, prompts, monkeypatch, num_blocks=12, use_async_batching=False)


@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.extended)], ids=["padded", "traced"])
def test_static_shapes_are_padded_with_a_trash_slot(traced, monkeypatch):
    """The manager pads the batches of compiled models. Tracing them takes most of the time: not by default."""
    model, prompts = tiny.model("qwen3_next"), runs.prompts((5, 70, 1))
    hf_gdn.patch()
    if not traced:
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    out = model.generate_batch(
        prompts,
        generation_config=runs.GREEDY,
        continuous_batching_config=runs.settings(
            varlen_compile_config=CompileConfig(backend="eager", fullgraph=False, mode=None)
        ),
    )
    assert len(out) == 3
    for made in out.values():
        runs.assert_greedy(model, made)
