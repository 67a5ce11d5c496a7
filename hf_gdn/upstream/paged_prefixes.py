"""Prefix sharing of continuous batching for hybrid models: snapshots of states where blocks of a prompt end.

transformers shares blocks of equal prompts if every allocator can. Blocks of full attention hold tokens, so any number
of them is a prefix; linear attention has one state, which is that of all tokens read. So the states after a piece of a
prompt that ends with a block are copied to another block, which is found by the hash of that prefix. A request begins
at the longest prefix for which both blocks of full attention and a snapshot exist, with a copy of the snapshot in its
slot. Pieces of prompts end where snapshots are of use: with the last block of the prompt, and where it leaves a prompt
that was read before.

Snapshots are cached blocks of the allocator's ledger, like blocks of finished requests: transformers evicts them, all
at once, when memory is short. They take a quarter of the cache at most; the least recently used one is replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

FULL, LINEAR = "full_attention", "linear_attention"


def piece_length(begin: int, tokens: int, budget: int, page: int, shared: int) -> int:
    """How many tokens of a prompt to read next, at most `budget`.

    Args:
        begin: how many tokens of the prompt were read.
        tokens: how many are left.
        budget: how many the batch has room for.
        page: tokens of a block.
        shared: how many tokens at the beginning of the prompt are in blocks of other requests; a multiple of `page`.
    """
    # The last token of a prompt is always read, for its logits.
    end = begin + (tokens - 1 if tokens <= budget else budget)
    end = shared if begin < shared < end else end // page * page
    return end - begin if end > begin else budget


class Snapshots:
    """What the allocator of linear-attention layers does for prefix sharing; keys are hashes of prefixes."""

    index: int
    ledger: Any
    pool: Any
    block_table: dict[str, list[int]]
    num_blocks: int
    needs_new_sectors: Callable[[str, int, int], int]
    allocate_cache_to_request: Callable[[str, int, int], None]
    copy_blocks: Callable[[list[int], list[int]], None]
    _copy_view: torch.Tensor

    def set_budget(self) -> None:
        self.max_snapshots = self.num_blocks // 4
        # How many tokens at the beginning of a request's prompt are in blocks of others.
        self.shared_tokens: dict[str, int] = {}

    def count_shareable_blocks(self, source_request_id: str, past_length: int) -> int:
        return 0  # a fork goes on from a copy of the states

    def mark_complete_blocks(self, request_id: str, token_ids: list[int], new_new_blocks: int) -> None:
        pass  # a request's block is never complete

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        self.shared_tokens.pop(request_id, None)
        super().free_blocks(request_id, no_cache)  # type: ignore[misc]

    def has_snapshot(self, key: int) -> bool:
        return key in self.ledger.hash_to_block

    def take_snapshot(self, request_id: str, key: int) -> None:
        """Keep a copy of a request's states, unless there is one for this prefix or there is no room."""
        if self.has_snapshot(key):
            self._use(self.ledger.hash_to_block[key])
            return
        block = self._room()
        if block is not None:
            self._copy(self.block_table[request_id][0], block)
            self.ledger.register_new_hash(block, key)
            self._use(block)

    def begin_with_snapshot(self, request_id: str, key: int) -> bool:
        """Give a request a slot with a copy of a snapshot. Returns False, without effect, if no slot is free."""
        sectors = self.needs_new_sectors(request_id, 0, 1)
        if sectors > self.pool.num_free_sectors:
            return False
        for _ in range(sectors):
            self.pool.allocate_sector(self.index)
        self.allocate_cache_to_request(request_id, 0, 1)
        block = self.ledger.hash_to_block[key]
        self._use(block)
        self._copy(block, self.block_table[request_id][0])
        return True

    def _use(self, block: int) -> None:
        """Make a snapshot the most recently used one."""
        self.ledger.cached_blocks.pop(block, None)
        self.ledger.cached_blocks[block] = None

    def _room(self) -> int | None:
        """A block for a snapshot: a free one, or that of the least recently used snapshot; None if there is none.

        A quarter of the sectors stays free for requests.
        """
        snapshots = self.ledger.cached_blocks
        if len(snapshots) < self.max_snapshots:
            if not self.pool.count_free_blocks(self.index) and 4 * self.pool.num_free_sectors > self.pool.num_sectors:
                self.pool.allocate_sector(self.index)
            if self.pool.count_free_blocks(self.index):
                return self.pool.get_free_blocks(self.index, 1)[0]
        if not snapshots:
            return None
        oldest = next(iter(snapshots))
        del snapshots[oldest]
        del self.ledger.hash_to_block[self.ledger.block_to_hash.pop(oldest)]
        return oldest

    def _copy(self, source: int, destination: int) -> None:
        device = self._copy_view.device
        if device.type != "cpu":  # batches and offloading run on another stream
            torch.accelerator.synchronize(device)
        self.copy_blocks([source], [destination])
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def _shares(cache: Any) -> bool:
    return LINEAR in cache.cache_allocators and cache.use_prefix_sharing


def _make_search(original: Callable[..., int]) -> Callable[..., int]:
    """Make the method that gives a request the blocks of a prefix that was read, and returns its length."""

    @functools.wraps(original)
    def search_prefix_match(self: Any, request_id: str, prompt_ids: list[int]) -> int:
        if not _shares(self):
            return original(self, request_id, prompt_ids)
        full, linear = self.cache_allocators[FULL], self.cache_allocators[LINEAR]
        blocks = full.match_prefix_blocks(prompt_ids)
        keys = [full.ledger.block_to_hash[block] for block in blocks]
        linear.shared_tokens[request_id] = len(blocks) * full.tokens_per_page
        count = next((n for n in range(len(keys), 0, -1) if linear.has_snapshot(keys[n - 1])), 0)
        if count == 0 or not linear.begin_with_snapshot(request_id, keys[count - 1]):
            return 0
        full.acquire_prefix_blocks(request_id, count * full.tokens_per_page, blocks)
        return count * full.tokens_per_page

    return search_prefix_match


def _make_mark(original: Callable[..., None]) -> Callable[..., None]:
    """Make the method that is called after a forward, with a request and its new complete blocks."""

    @functools.wraps(original)
    def mark_complete_blocks(self: Any, state: Any, complete_blocks: dict[str, int]) -> None:
        original(self, state, complete_blocks)
        if not _shares(self) or not state.remaining_prefill_tokens:
            return
        full, read = self.cache_allocators[FULL], state.current_len()
        if read > 0 and read % full.tokens_per_page == 0:
            last = full.block_table[state.request_id][read // full.tokens_per_page - 1]
            if last in full.ledger.block_to_hash:
                self.cache_allocators[LINEAR].take_snapshot(state.request_id, full.ledger.block_to_hash[last])

    return mark_complete_blocks


def _make_can_store(original: Callable[..., bool]) -> Callable[..., bool]:
    """Make the method that allocates a request's blocks. What is cached makes room for it."""

    @functools.wraps(original)
    def can_store_request_tokens(self: Any, *args: Any, **kwargs: Any) -> bool:
        if original(self, *args, **kwargs):
            return True
        if not _shares(self) or not self.evict_cached_blocks():
            return False
        self.pool.try_to_free_sectors()
        return original(self, *args, **kwargs)

    return can_store_request_tokens


def _ask_again(scheduler: Any, state: Any) -> None:
    """Queue a request's further answers as requests of their own."""
    children, state.num_children = state.num_children, 0
    for i in range(children):
        child = state.create_equivalent_initial_request()
        child.request_id = f"{state.request_id}__child#{i}"
        scheduler.add_waiting_request(child)


def _make_schedule(original: Callable[..., None]) -> Callable[..., None]:
    """Make the method that decides how many tokens of a request the next batch has.

    transformers forks a request when all but the last token of its prompt are read. Where only that one is left from
    the start, there is nothing to read before.
    """

    @functools.wraps(original)
    def _schedule_request(self: Any, state: Any, request_tokens: list[int], token_budget: int, *args: Any) -> None:
        if LINEAR in self.cache.cache_allocators and state.num_children and len(request_tokens) == 1:
            _ask_again(self, state)
        if _shares(self.cache) and state.status.name != "DECODING":
            linear, page = self.cache.cache_allocators[LINEAR], self.cache.cache_allocators[FULL].tokens_per_page
            shared = linear.shared_tokens.get(state.request_id, 0)
            token_budget = piece_length(state.current_len(), len(request_tokens), token_budget, page, shared)
        original(self, state, request_tokens, token_budget, *args)

    return _schedule_request


# Class, method, and the function that makes its replacement.
METHODS: tuple[tuple[str, str, str, Callable[[Any], Any]], ...] = (
    ("cache", "PagedAttentionCache", "search_prefix_match", _make_search),
    ("cache", "PagedAttentionCache", "mark_complete_blocks", _make_mark),
    ("cache", "PagedAttentionCache", "can_store_request_tokens", _make_can_store),
    ("scheduler", "Scheduler", "_schedule_request", _make_schedule),
)
