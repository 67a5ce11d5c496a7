"""Continuous batching of transformers: its seams, and the allocator of the paged cache for linear-attention layers.

A `PagedAttentionCache` divides one tensor of bytes into sectors, gives these to allocators, one for each layer type,
and each allocator divides its sectors into blocks. The linear-attention layers of a request take one block: a page for
every layer, which holds the recurrent state and the convolution state. A block's number is the request's slot.
"""

from __future__ import annotations

import contextlib
import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator
from math import ceil, lcm
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import PatchError
from ..log import warn_once
from . import paged_prefixes, seams, versions
from .paged_prefixes import LINEAR

# The first version that has the seams; where they are missing, the text of the error names it.
FIRST = "5.23"
_PACKAGE = "transformers.generation.continuous_batching"
_ABSTRACT = {
    "allocate_cache_to_request",
    "fill_block_table",
    "get_cache_for_block_table",
    "get_read_indices",
    "get_seqlen_k",
    "get_write_indices",
    "needs_new_blocks",
    "register_cache_tensor",
    "update",
}
_ALIGNMENT = 128  # bytes, of the states of a layer


class LayerStates(NamedTuple):
    """Shapes of what one linear-attention layer keeps of a request: states ``[HV, K, V]`` and ``[C, width]``."""

    v_heads: int
    k_dim: int
    v_dim: int
    channels: int
    width: int

    def bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of the recurrent state and of the convolution state for a model of `dtype`, as they are aligned."""
        state = torch.float64 if dtype == torch.float64 else torch.float32
        sizes = (
            self.v_heads * self.k_dim * self.v_dim * state.itemsize,
            self.channels * self.width * dtype.itemsize,
        )
        return tuple(_ALIGNMENT * ceil(size / _ALIGNMENT) for size in sizes)  # type: ignore[return-value]


class PackedBatch(NamedTuple):
    """The sequences of one forward of continuous batching, packed in one row of T tokens."""

    cu_seqlens: Tensor  # [N + 1], from 0 to T
    slots: Tensor  # [N], the slot of every sequence
    begun: Tensor  # [N], whether the slot holds its state
    longest: int  # upper bound of the tokens of a sequence
    single: bool  # every sequence is one token: N = T


# --------------------------------------------------------------------------------------------------------------- seams


def _named(module: str, name: str) -> Any:
    return seams.class_of(f"{_PACKAGE}.{module}", name)


def manager_class() -> Any:
    """The class whose instances run continuous batching for a model, the first argument of its ``__init__``."""
    return _named("continuous_api", "ContinuousBatchingManager")


def check() -> None:
    """Raise PatchError unless linear-attention layers can be added to the paged cache."""
    try:
        table, base = allocators(), _named("cache_allocators", "CacheAllocator")
        _named("cache_allocators", "FullAttentionCacheAllocator")
        scheduler, inputs = _named("scheduler", "Scheduler"), _named("input_outputs", "ContinuousBatchingIOs")
    except PatchError as error:
        raise PatchError(
            f"continuous batching of hybrid models needs transformers >= {FIRST}; {versions.installed()} is installed"
        ) from error
    there = (isinstance(table, dict), "full_attention" in table, LINEAR not in table or _is_ours(table[LINEAR]))
    if not all(there) or set(base.__abstractmethods__) != _ABSTRACT:
        raise PatchError(f"the paged cache of {versions.installed()} is not as expected: other allocators or methods")
    if "sdpa" not in attention_functions():
        raise PatchError(f"AttentionInterface of {versions.installed()} has no function 'sdpa'")
    methods = [(_named(module, cls), name) for module, cls, name, _ in paged_prefixes.METHODS]
    methods += [(scheduler, "add_waiting_request"), (scheduler, "clear_cancelled_requests")]
    for cls, name in (*methods, (inputs, "_setup_static_tensors")):
        if name not in vars(cls):
            raise PatchError(f"{cls.__name__} of {versions.installed()} has no {name}")


def missing() -> str | None:
    """Why the installed transformers cannot batch hybrid models continuously; None if it can."""
    try:
        check()
    except PatchError as error:
        return str(error)
    return None


def allocators() -> Any:
    """The table of allocator classes by layer type."""
    return _named("cache", "ATTN_TYPE_TO_ALLOCATOR")


def attention_functions() -> Any:
    """The table of attention functions by ``attn_implementation``."""
    return seams.class_of("transformers.modeling_utils", "AttentionInterface")._global_mapping


def places(
    states_of: Callable[[Any], LayerStates],
    make_init: Callable[[Any], Any],
    make_start: Callable[[Any], Any],
    make_sdpa: Callable[[Any], Any],
) -> list[tuple[Any, str, Callable[[Any], Any]]]:
    """What to swap: class or dict, name, and a function that makes the replacement from the original.

    Args:
        states_of: the states of a config's layers; raises a ValueError if it cannot be served.
        make_init, make_start: make the manager's ``__init__`` and ``start``.
        make_sdpa: makes the attention function for batches that have no mask.
    """
    found = [(manager_class(), "__init__", make_init), (manager_class(), "start", make_start)]
    if missing() is None:
        found += [
            (allocators(), LINEAR, lambda _: allocator_class(states_of)),
            (_named("input_outputs", "ContinuousBatchingIOs"), "_setup_static_tensors", _make_setup),
            (attention_functions(), "sdpa", make_sdpa),
            (_named("scheduler", "Scheduler"), "add_waiting_request", _make_add_waiting_request),
            (_named("scheduler", "Scheduler"), "clear_cancelled_requests", _make_clear_cancelled_requests),
        ]
        found += [(_named(module, cls), name, make) for module, cls, name, make in paged_prefixes.METHODS]
        if "pause" in vars(manager_class()):  # not in every version
            found.append((manager_class(), "pause", _make_pause))
    return found


def _make_setup(original: Callable[..., None]) -> Callable[..., None]:
    """Make the method that allocates a batch's tensors: keys and masks have an entry for every layer type.

    On a CPU there is no mask, since requests attend to their own keys (`make_sdpa` of `places`).
    """

    @functools.wraps(original)
    def setup(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if LINEAR in self.cache.cache_allocators and LINEAR not in self.cumulative_seqlens_k:
            size = self.max_requests_per_batch + 1
            self.cumulative_seqlens_k[LINEAR] = torch.zeros(size, dtype=torch.int32, device=self.device)
            self.total_seqlen_k[LINEAR] = self.max_length_k[LINEAR] = 0
            if self.device.type == "cpu" and self.config._attn_implementation == "sdpa":
                self.attention_mask = None
            if self.attention_mask is not None:
                self.attention_mask[LINEAR] = torch.empty(1, 1, 0, 0, dtype=self.model_dtype, device=self.device)

    return setup


def _make_add_waiting_request(original: Callable[..., None]) -> Callable[..., None]:
    """Make the method that queues a request. One that cannot be served fails alone, instead of stopping the manager."""

    @functools.wraps(original)
    def add_waiting_request(self: Any, state: Any) -> None:
        # A request that comes back after it was preempted was checked before.
        if LINEAR in self.cache.cache_allocators and not state._true_initial_tokens:
            if not state.initial_tokens:
                raise ValueError("expected a prompt of at least one token, got an empty one")
            _check_names(self, state)
            _check_fits(self.cache, len(state.initial_tokens), state.max_new_tokens)
            if state.max_new_tokens is None:
                state.max_new_tokens = _room(self.cache, len(state.initial_tokens))
                state.__post_init__()  # takes the limit over
                warn_once("requests without max_new_tokens end at the latest where they fill the cache")
        original(self, state)

    return add_waiting_request


def _check_names(scheduler: Any, state: Any) -> None:
    """Raise ValueError if the name of a new request, or of one of its further answers, is in use."""
    children = (f"{state.request_id}__child#{i}" for i in range(state.num_children))
    for name in (state.request_id, *children):
        if name in scheduler.active_requests or name in scheduler.waiting_requests:
            raise ValueError(
                f"expected a request_id that is not in use, got {state.request_id!r}: {name!r} runs or waits"
            )


def _make_clear_cancelled_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make the method that removes cancelled requests. As finished ones do, they make room for those that wait.

    transformers lets no waiting request begin between a preemption and the next request that finishes.
    """

    @functools.wraps(original)
    def clear_cancelled_requests(self: Any) -> Any:
        active = len(self.active_requests)
        cancelled = original(self)
        if LINEAR in self.cache.cache_allocators and len(self.active_requests) < active:
            self.block_new_requests = False
        return cancelled

    return clear_cancelled_requests


def _sectors(cache: Any, tokens: int) -> int:
    """How many sectors the first tokens of a request take."""
    needed = 0
    for allocator in cache.cache_allocators.values():
        # A name that no request has: it holds no blocks yet.
        needed += ceil(allocator.needs_new_blocks("", 0, tokens) / allocator.blocks_per_sector)
    return needed


def _room(cache: Any, prompt: int) -> int:
    """How many new tokens of a request fit in an empty cache. The last one is never processed."""
    most = range(1, cache.num_sectors * cache.tokens_per_sector + 2)
    return bisect_right(most, cache.num_sectors, key=lambda new: _sectors(cache, prompt + new - 1))


def _check_fits(cache: Any, prompt: int, limit: int | None) -> None:
    """Raise ValueError unless a request fits in an empty cache."""
    new = max(1, limit or 1)
    needed = _sectors(cache, prompt + new - 1)
    if needed > cache.num_sectors:
        raise ValueError(
            f"expected a request that fits in the cache, got {prompt} prompt tokens and up to {new} new ones, which "
            f"take {needed} sectors, of {cache.num_sectors} with {cache.bytes_per_sector / 2**20:.1f} MiB each; raise "
            "num_blocks or max_memory_percent of the ContinuousBatchingConfig"
        )


# ----------------------------------------------------------------------------------------------------------- allocator


def block_layout(needed: int, unit: int) -> tuple[int, int, int]:
    """How blocks of `needed` bytes share sectors with blocks of `unit` bytes.

    A sector is a multiple of the bytes of every allocator's block. Left as they are, two sizes with few common factors
    make sectors of gigabytes. So blocks of linear attention are padded: the smallest sector is chosen that pads them by
    at most an eighth.

    Returns:
        Bytes of a block, blocks in a sector, and units in a sector.
    """
    best = None
    for units in range(1, max(64, ceil(2 * needed / unit)) + 1):
        sector = units * unit
        for blocks in range(sector // needed, 0, -1):
            if sector % (blocks * _ALIGNMENT) == 0:
                size = sector // blocks
                if best is None or size < best[0]:
                    best = size, blocks, units
                break
        if best is not None and best[0] <= 1.125 * needed:
            break
    assert best is not None
    return best


def _unit(config: Any, num_key_value_heads: int, dtype: torch.dtype, page_size: int) -> int:
    """Bytes that the blocks of all other layer types divide, and the alignment of sectors."""
    full, utils = _named("cache_allocators", "FullAttentionCacheAllocator"), f"{_PACKAGE}.utils"
    head_dim = seams.class_of(utils, "find_head_dim")(config)
    page = full.get_bytes_per_page(num_key_value_heads, head_dim, dtype, page_size)
    others = [layer_type for layer_type in config.layer_types if layer_type != LINEAR]
    return lcm(*(others.count(layer_type) * page for layer_type in set(others)), _ALIGNMENT)


def _is_ours(allocator: Any) -> bool:
    return getattr(allocator, "is_of_hf_gdn", False)


@functools.cache
def allocator_class(states_of: Callable[[Any], LayerStates]) -> Any:
    """The allocator of linear-attention layers: one block for each request, for as long as the request is active."""

    class LinearAttentionCacheAllocator(paged_prefixes.Snapshots, _named("cache_allocators", "CacheAllocator")):
        supports_block_sharing = True
        supports_block_table = True
        layer_type = LINEAR
        rows_per_token = 1
        is_of_hf_gdn = True

        def __init__(
            self,
            index: int,
            config: Any,
            num_key_value_heads: int,
            cache_dtype: torch.dtype,
            page_size: int,
            layer_indices: list[int],
            allow_block_sharing: bool,
        ) -> None:
            self.states, self.dtype = states_of(config), cache_dtype
            self._before_cache_tensor_init(
                index=index,
                layer_indices=layer_indices,
                tokens_per_page=page_size,
                bytes_per_page=sum(self.states.bytes(cache_dtype)),
                allow_block_sharing=allow_block_sharing,
            )
            unit = _unit(config, num_key_value_heads, cache_dtype, page_size)
            layout = block_layout(self.pages_per_block * self.bytes_per_page, unit)
            self.bytes_per_block: int = layout[0]
            _, blocks, units = layout
            # Tables of the cache are sized by the layer type with the most tokens in a sector: not by this one.
            self.tokens_per_page = max(1, min(page_size, page_size * units // blocks))

        def register_cache_tensor(
            self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: Any
        ) -> None:
            size = self.bytes_per_block
            self._copy_view = cache_tensor.view(-1, size)
            self.blocks_per_sector, self.num_blocks = bytes_per_sector // size, non_trash_bytes // size
            self.num_pages = self.num_blocks * self.pages_per_block
            self.cache_tensor, self.pool = cache_tensor, pool
            pool.set_blocks_per_sector(self.index, self.blocks_per_sector)
            # As for other allocators, the first two sectors are trash; indices are those of blocks.
            self.read_trash_index, self.sentinel_index, self.write_trash_index = 0, 1, self.blocks_per_sector
            self.set_budget()
            self._pools = {layer: self._pools_of(i) for i, layer in enumerate(self.layer_indices)}

        def _pools_of(self, page: int) -> tuple[Tensor, Tensor]:
            """Convolution states ``[blocks, C, width]`` and states ``[blocks, HV, K, V]`` of a layer, views."""
            heads, k_dim, v_dim, channels, width = self.states
            state_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
            begin, blocks = page * self.bytes_per_page, len(self._copy_view)

            def view(dtype: torch.dtype, offset: int, *shape: int) -> Tensor:
                strides = torch.empty(shape, device="meta").stride()
                return self.cache_tensor.view(dtype).as_strided(
                    (blocks, *shape), (self.bytes_per_block // dtype.itemsize, *strides), offset // dtype.itemsize
                )

            state = view(state_dtype, begin, heads, k_dim, v_dim)
            return view(self.dtype, begin + self.states.bytes(self.dtype)[0], channels, width), state

        def pools(self, layer_idx: int) -> tuple[Tensor, Tensor]:
            """The pools of a layer: convolution states ``[P, C, width]`` and states ``[P, HV, K, V]``."""
            return self._pools[layer_idx]

        def needs_new_blocks(self, request_id: str, past_length: int, query_length: int) -> int:
            return 0 if self.block_table.get(request_id) else 1

        def allocate_cache_to_request(self, request_id: str, past_length: int, query_length: int) -> None:
            if not self.block_table.get(request_id):
                self.block_table[request_id] = self.pool.get_free_blocks(self.index, 1)

        def get_seqlen_k(self, past_length: int, query_length: int) -> int:
            return query_length  # of masks and lengths of keys, which linear attention does not read

        def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
            return []

        def get_write_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
            return self.block_table[request_id][:1]

        def fill_block_table(self, request_id: str, past_length: int, query_length: int, block_table: Tensor) -> None:
            block_table[0] = self.block_table[request_id][0]

        def update(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("linear attention has no keys and values")

        def get_cache_for_block_table(self, layer_idx: int) -> Any:
            raise NotImplementedError("linear attention has no keys and values")

    return LinearAttentionCacheAllocator


# --------------------------------------------------------------------------------------------------------- each forward


def is_paged(cache: Any) -> bool:
    """Whether a cache is a paged one with slots for linear-attention layers."""
    return LINEAR in getattr(cache, "cache_allocators", ())


def as_argument(cache: Any) -> dict[str, Any]:
    """A paged cache as an argument of a model: its name was this one before that of other caches was."""
    return {"cache": cache}


def pools(cache: Any, layer_idx: int) -> tuple[Tensor, Tensor]:
    """The pools of a layer: convolution states ``[P, C, width]`` and states ``[P, HV, K, V]``."""
    return cache.cache_allocators[LINEAR].pools(layer_idx)


def with_cached(module: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Keys and values of cached and new tokens, in an attention function; `kwargs` are its own, changed in place.

    Attention layers of transformers 5.24 update the cache before, those of 5.23 leave it to the attention function.
    """
    cache = kwargs.pop("cache", None)
    return (key, value) if cache is None else cache.update(key, value, module.layer_idx, kwargs)


def batch_of(cache: Any, arguments: dict[str, Any], tokens: int) -> PackedBatch:
    """The sequences of a forward, from its keyword arguments and the number of its tokens.

    Tokens after the last sequence, which pad a batch to a static size, are a sequence in a slot that nobody reads.
    """
    allocator, cu_seqlens = cache.cache_allocators[LINEAR], arguments["cu_seq_lens_q"]
    sequences, table = len(cu_seqlens) - 1, arguments.get("block_table")
    # Keys of any other layer type outnumber the queries of a sequence that has begun.
    keys = next(x for layer_type, x in arguments["cu_seq_lens_k"].items() if layer_type != LINEAR)
    begun = keys.diff() > cu_seqlens.diff()
    if table is None:
        slots = arguments["write_index"][allocator.index][:sequences]
    else:
        slots = table[allocator.index, :sequences, 0].to(torch.int64)
        slots = torch.where(slots < 0, allocator.write_trash_index, slots)
    longest = arguments["max_length_q"]
    single = longest == 1 and sequences == tokens
    if not single and (cu_seqlens.device.type != "cpu" or cu_seqlens[-1] < tokens):
        cu_seqlens = torch.cat((cu_seqlens, cu_seqlens.new_full((1,), tokens)))
        slots = torch.cat((slots, slots.new_full((1,), allocator.write_trash_index)))
        begun = torch.cat((begun, begun.new_zeros(1)))
    return PackedBatch(cu_seqlens, slots, begun, max(longest, 1), single)


# ------------------------------------------------------------------------------------------------------------- managers


def forget(manager: Any) -> None:
    """Drop the paged cache of a manager that does not run, and the manager itself where its model keeps it."""
    model, manager.batch_processor = manager.model, None
    if getattr(model, "_cached_continuous_batching_manager", None) is manager:
        model.destroy_cached_continuous_batching_manager()


def forget_prefixes(manager: Any) -> None:
    """Drop what a manager that does not run, or pauses, keeps of prompts that were read: weights may have changed.

    Without a snapshot no request begins at blocks of another one.
    """
    cache = getattr(manager.batch_processor, "cache", None)
    if cache is not None and LINEAR in cache.cache_allocators:
        cache.evict_cached_blocks()


def _make_pause(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make the manager's context manager in which weights may be changed."""

    @contextlib.contextmanager
    def pause(self: Any) -> Iterator[None]:
        with original(self):
            try:
                yield
            finally:
                forget_prefixes(self)

    return functools.wraps(original)(pause)


def tensor_parallel_size(model: Any) -> int:
    """How many processes share the layers of a model."""
    return getattr(model, "tp_size", None) or 1
