"""Runs of continuous batching on tiny models, and the same prompts one by one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from hf_gdn.testing.tolerances import LOG_PROBABILITY
from hf_gdn.upstream import paged

needs_seams = pytest.mark.skipif(paged.missing() is not None, reason=str(paged.missing()))
GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0)
# A cache of six sectors; one request of 320 tokens takes three of them.
TINY_POOL = dict(num_blocks=14, max_requests_per_batch=8)


def prompts(lengths, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths for a tiny model."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (length,), generator=random).tolist() for length in lengths]


def settings(**changes) -> ContinuousBatchingConfig:
    """A small cache: 64 pages of 16 tokens, batches of 64 tokens."""
    return ContinuousBatchingConfig(**{**dict(page_size=16, num_blocks=64, max_batch_tokens=64), **changes})


def alone(model, prompt: list[int], generation: GenerationConfig = GREEDY, **changes) -> list[int]:
    """New tokens of ``generate`` for one prompt."""
    out = model.generate(torch.tensor([prompt]), generation_config=generation, **changes)
    return out[0, len(prompt) :].tolist()


@contextlib.contextmanager
def manager(model, generation: GenerationConfig = GREEDY, **changes) -> Iterator:
    """A running manager."""
    with model.continuous_batching_context_manager(generation, continuous_batching_config=settings(**changes)) as made:
        yield made


def results(made, ids, seconds: float = 120.0) -> dict:
    """Finished outputs of the requests, by name."""
    found, until = {}, time.monotonic() + seconds
    while len(found) < len(ids):
        assert time.monotonic() < until, f"no result for {sorted(set(ids) - set(found))}"
        out = made.get_result(timeout=0.1)
        if out is not None and out.is_finished():
            found[out.request_id] = out
        elif out is None and not made.is_running():
            break
    return found


def cache_of(made):
    """The paged cache of a manager that has started."""
    return made.batch_processor.cache


def assert_nothing_held(cache) -> None:
    """No request has a block, and once what is cached is evicted, all sectors are free, as at the start."""
    cache.evict_cached_blocks()
    cache.pool.try_to_free_sectors()
    held = {name: dict(allocator.block_table) for name, allocator in cache.cache_allocators.items()}
    assert not any(held.values()), held
    assert sorted(cache.pool.free_sectors) == list(range(2, cache.num_sectors + 2))


def assert_greedy(model, out) -> None:
    """Every new token is the argmax of a forward over all tokens before it, as in `generate` for the prompt alone.

    Log-probabilities, which show smaller errors of states, are compared if the manager returns them.
    """
    assert out.error is None, out.error
    new = out.generated_tokens
    with torch.no_grad():
        logits = model(torch.tensor([out.prompt_ids + new])).logits[0, len(out.prompt_ids) - 1 : -1]
    assert new == logits.argmax(-1).tolist(), out.request_id
    if out.logprobs:
        exact = logits.log_softmax(-1).amax(-1)
        assert (torch.tensor(out.logprobs) - exact).abs().max() < LOG_PROBABILITY, out.request_id


def offload_without_pinned_memory(monkeypatch) -> list:
    """Let requests be offloaded to memory that is not pinned, since a CPU has none. Returns what is offloaded."""
    from transformers.generation.continuous_batching import offloading_manager

    empty, moved = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kwargs: empty(*size, **kwargs))
    original = offloading_manager.OffloadingManager._offload_to_cpu

    def offload(self, *args):
        done = original(self, *args)
        moved.extend(done)
        return done

    monkeypatch.setattr(offloading_manager.OffloadingManager, "_offload_to_cpu", offload)
    return moved


def assert_offloaded_and_right(model, prompts, monkeypatch, **settings) -> None:
    """Requests are offloaded, since the cache is small, and come back: answered as alone, and nothing is held."""
    moved = offload_without_pinned_memory(monkeypatch)
    with manager(model, cpu_offload_space=0.01, **settings) as made:
        ids = [made.add_request(prompt, max_new_tokens=60, eos_token_id=-1) for prompt in prompts]
        out = results(made, ids)
        cache = cache_of(made)
    assert moved
    for request in ids:
        assert_greedy(model, out[request])
    assert_nothing_held(cache)
