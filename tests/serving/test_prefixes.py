"""Prompts with a common beginning: it is read once, answers stay those of `generate`, and nothing leaks."""

import contextlib
import random
from unittest import mock

import pytest
import torch
from transformers import GenerationConfig

import hf_gdn
from hf_gdn.upstream import paged
from hf_gdn.upstream.paged_prefixes import piece_length
from tests import tiny_models as tiny
from tests.serving import runs

pytestmark = runs.needs_seams
PAGE, NEW = 16, 4


@contextlib.contextmanager
def counted(model):
    """Yields a list of the tokens of every forward."""
    counts = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    yield counts
    hook.remove()


def answer_in_turn(model, prompts, budget: int | None = None, **changes) -> list[int]:
    """Answer one prompt after another with one manager. Returns how many tokens of each prompt were read."""
    read = []
    with runs.manager(model, return_logprobs=True, **changes) as made:
        if budget is not None:
            runs.results(made, [made.add_request([3], max_new_tokens=1)])
            runs.cache_of(made).cache_allocators[paged.LINEAR].max_snapshots = budget
        for prompt in prompts:
            with counted(model) as counts:
                name = made.add_request(prompt, max_new_tokens=NEW, eos_token_id=-1)
                out = runs.results(made, [name])[name]
            runs.assert_greedy(model, out)
            assert len(out.logprobs) == NEW
            read.append(sum(counts) - (NEW - 1))  # the last new token is never read
        cache = runs.cache_of(made)
    runs.assert_nothing_held(cache)
    return read


@pytest.mark.parametrize("length", [100, 97, 96, 33])
@pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid"])
def test_a_prompt_that_was_read_is_not_read_again(family, length):
    model, (prompt,) = tiny.model(family), runs.prompts((length,))
    hf_gdn.patch()
    # All its whole blocks but for the last token, from which the answer begins.
    assert answer_in_turn(model, [prompt] * 3) == [length, *[(length - 1) % PAGE + 1] * 2]


def test_a_prompt_within_a_block_is_read_as_a_whole():
    model, (prompt,) = tiny.model("qwen3_next"), runs.prompts((16,))
    hf_gdn.patch()
    assert answer_in_turn(model, [prompt] * 2) == [16, 16]


def test_a_conversation_goes_on_where_its_last_prompt_ended():
    model, (prompt, message) = tiny.model("qwen3_next"), runs.prompts((90, 20))
    hf_gdn.patch()
    longer = prompt + runs.alone(model, prompt, max_new_tokens=NEW, eos_token_id=-1) + message
    assert answer_in_turn(model, [prompt, longer]) == [90, len(longer) - 80]


def test_a_common_beginning_is_found_by_the_second_prompt_and_used_from_the_third_on():
    model, (common, *tails) = tiny.model("qwen3_next"), runs.prompts((70, 50, 40, 30))
    hf_gdn.patch()
    read = answer_in_turn(model, [common + tail for tail in tails], max_batch_tokens=128)
    assert read == [120, 110, 100 - 64]


@pytest.mark.parametrize("paused", [True, False], ids=["while it pauses", "while it does not run"])
def test_nothing_is_kept_of_weights_that_change(paused):
    model, (prompt,) = tiny.model("qwen3_next"), runs.prompts((100,))
    hf_gdn.patch()
    made = model.init_continuous_batching(runs.GREEDY, runs.settings(return_logprobs=True))
    made.start()
    try:
        for change in (0.0, 0.05):
            if paused:
                pause = made.pause()
            else:
                made.stop(keep_for_next_session=True)
                pause = contextlib.nullcontext()
            with pause, torch.no_grad():
                for weight in model.parameters():
                    weight.data.add_(change * torch.randn_like(weight))
            if not paused:
                made.start()
            with counted(model) as counts:
                out = [
                    runs.results(made, [made.add_request(prompt, max_new_tokens=NEW, eos_token_id=-1)])
                    for _ in range(2)
                ]
            assert sum(counts) - 2 * (NEW - 1) == 100 + 4  # by the first; the second begins at its snapshot
            for found in out:
                runs.assert_greedy(model, *found.values())
    finally:
        made.stop()


def test_without_sharing_all_is_read():
    model, (prompt,) = tiny.model("qwen3_next"), runs.prompts((100,))
    hf_gdn.patch()
    assert answer_in_turn(model, [prompt] * 2, allow_block_sharing=False) == [100, 100]


@pytest.mark.skipif("lara_mini" not in tiny.CONFIGS, reason="the installed transformers does not have it")
def test_sliding_windows_cannot_share():
    model, (prompt,) = tiny.model("lara_mini"), runs.prompts((60,))
    hf_gdn.patch()
    assert answer_in_turn(model, [prompt] * 2) == [60, 60]


def test_a_budget_of_no_snapshot():
    model, (prompt,) = tiny.model("qwen3_next"), runs.prompts((100,))
    hf_gdn.patch()
    assert answer_in_turn(model, [prompt] * 2, budget=0) == [100, 100]


@pytest.mark.parametrize(("budget", "again"), [(1, 50), (2, 2)])
def test_the_least_recently_used_snapshot_is_replaced(budget, again):
    """Each prompt of 50 tokens leaves one snapshot, at 48."""
    model, (one, two, three) = tiny.model("qwen3_next"), runs.prompts((50, 50, 50))
    hf_gdn.patch()
    # With room for two, `one` was used after `two`, so `three` takes the place of `two`.
    assert answer_in_turn(model, [one, two, one, three, one], budget, max_batch_tokens=128) == [
        50, 50, again, 50, again,
    ]  # fmt: skip


def test_pieces_of_prompts_end_where_a_snapshot_is_of_use():
    def piece(begin, tokens, budget, shared=0):
        return piece_length(begin, tokens, budget, PAGE, shared)

    assert piece(0, 100, 256) == 96  # the last block that is complete
    assert piece(96, 4, 256) >= 4
    assert piece(0, 96, 256) == 80  # the last token is always read
    assert piece(0, 100, 256, shared=64) == 64  # where the prompt leaves another
    assert piece(64, 36, 256, shared=64) == 32
    assert piece(0, 100, 40) == 32  # whole blocks
    assert piece(0, 100, 10) == 10  # less than a block
    assert piece(10, 90, 10) == 6  # up to its end
    assert piece(0, 16, 256) >= 16
    for begin, tokens, budget in [(0, 1, 1), (5, 1, 9), (16, 1, 1), (15, 2, 2), (48, 700, 1)]:
        assert 1 <= piece(begin, tokens, budget) <= budget


def related_prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts that are beginnings of three texts, some with an end of their own."""
    chance, texts = random.Random(seed), runs.prompts((200, 150, 90), seed)
    ends = runs.prompts([chance.randint(1, 60) for _ in range(count)], seed + 1)
    found = []
    for end in ends:
        text = chance.choice(texts)
        found.append(text[: chance.choice((20, 48, 90, len(text)))] + (end if chance.random() < 0.6 else []))
    return found


def run_related(model, count: int, seed: int, **changes) -> int:
    """Related prompts that arrive and are cancelled at random, in a tiny pool. Returns how many began at a snapshot."""
    chance, begun, cancelled, sent, finished = random.Random(seed), 0, set(), [], {}
    allocator = paged.allocators()[paged.LINEAR]
    original = allocator.begin_with_snapshot

    def begin(self, *args):
        nonlocal begun
        done = original(self, *args)
        begun += done
        return done

    with (
        mock.patch.object(allocator, "begin_with_snapshot", begin),
        runs.manager(model, **{**runs.TINY_POOL, **changes}, return_logprobs=True) as made,
    ):
        for prompt in related_prompts(count, seed):
            sent.append(made.add_request(prompt, max_new_tokens=chance.randint(1, 20), eos_token_id=1))
            if chance.random() < 0.1:
                name = chance.choice(sent)
                cancelled.add(name)
                made.cancel_request(name)
            while len(sent) - len(finished.keys() | cancelled) > chance.randint(1, 8) and made.is_running():
                out = made.get_result(timeout=0.2)
                if out is not None and out.is_finished():
                    finished[out.request_id] = out
        finished |= runs.results(made, set(sent) - cancelled - finished.keys())
        fatal, cache = made.background_thread_status.fatal_error, runs.cache_of(made)
    assert fatal is None, fatal
    assert finished.keys() | cancelled == set(sent)
    runs.assert_nothing_held(cache)
    assert not cache.cache_allocators[paged.LINEAR].shared_tokens
    for out in finished.values():
        runs.assert_greedy(model, out)
    return begun


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_random_requests_that_begin_alike_in_a_small_pool(scheduler):
    model = tiny.model("qwen3_next")
    hf_gdn.patch()
    assert run_related(model, 30, 3, num_blocks=28, scheduler_type=scheduler) > 3


@pytest.mark.extended
def test_a_thousand_requests_that_begin_alike_in_tiny_pools():
    model = tiny.model("qwen3_next")
    hf_gdn.patch()
    begun = [
        run_related(
            model, 100, 100 + i, num_blocks=14 + 3 * i, scheduler_type=("fifo", "prefill_first")[i % 2],
            max_batch_tokens=(64, 40, 9)[i % 3],
        )
        for i in range(10)
    ]  # fmt: skip
    assert sum(begun) > 100


@pytest.mark.parametrize(("length", "again"), [(50, 2 + 2), (33, 3)], ids=["two tokens left", "one token left"])
def test_several_answers_to_a_prompt_that_was_read(length, again):
    """Children of a request that began at a snapshot; only the likeliest token is sampled, so all are alike."""
    model, (prompt,) = tiny.model("qwen3_next"), runs.prompts((length,))
    hf_gdn.patch()
    three = GenerationConfig(max_new_tokens=NEW, do_sample=True, top_k=1, num_return_sequences=3, eos_token_id=-1)
    wanted = runs.alone(model, prompt, max_new_tokens=NEW, eos_token_id=-1)
    with runs.manager(model, three) as made, counted(model) as counts:
        for _ in range(2):
            made.add_request(prompt, max_new_tokens=NEW, eos_token_id=-1)
            answers = [made.get_result(timeout=30) for _ in range(3)]
            assert [answer.generated_tokens for answer in answers] == [wanted] * 3
    # The last token of a prompt is read by each of the three.
    assert sum(counts) == (length + 2) + again + 2 * 3 * (NEW - 1)


def test_offloaded_requests_that_begin_alike(monkeypatch):
    model, (common, *tails) = tiny.model("qwen3_next"), runs.prompts((48, 40, 30, 50, 20, 10))
    hf_gdn.patch()
    prompts = [common + tail for tail in tails * 2]
    runs.assert_offloaded_and_right(model, prompts, monkeypatch, num_blocks=14, return_logprobs=True)
