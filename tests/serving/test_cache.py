"""The allocator of linear-attention layers: its memory at the sizes of released models, its slots, its views."""

from math import lcm

import pytest
import torch
from transformers import AutoConfig

import hf_gdn
from hf_gdn.loading.shapes import CONFIGS
from hf_gdn.patches import batching
from hf_gdn.upstream import paged
from tests import tiny_models as tiny
from tests.serving import runs

pytestmark = runs.needs_seams
MIB = 2**20
# Model type and values -> bytes of a request's states in bf16, and what a sector may take, at pages of 256 tokens.
# Heads, K and V are those of the config; a state is fp32, a convolution state has four columns in bf16.
SIZES = {
    "qwen3_next-80b": (*CONFIGS["qwen3_next-80b"], 36 * (32 * 128 * 128 * 4 + 8192 * 4 * 2), 78 * MIB),
    "qwen3_5-9b": ("qwen3_5_text", {}, 24 * (32 * 128 * 128 * 4 + 8192 * 4 * 2), 104 * MIB),
    "qwen3_5_moe-35b": ("qwen3_5_moe_text", {}, 30 * (32 * 128 * 128 * 4 + 8192 * 4 * 2), 65 * MIB),
    "olmo_hybrid": ("olmo_hybrid", {}, 24 * (30 * 96 * 192 * 4 + 11520 * 4 * 2), 270 * MIB),
}


def allocators(config, page_size: int) -> tuple:
    """The allocators of full and of linear attention."""
    ours = paged.allocator_class(batching.states_of)
    given = dict(
        config=config, num_key_value_heads=config.num_key_value_heads, cache_dtype=torch.bfloat16,
        page_size=page_size, allow_block_sharing=True,
    )  # fmt: skip
    by_type = {**paged.allocators(), paged.LINEAR: ours}
    found = []
    for index, kind in enumerate(("full_attention", paged.LINEAR)):
        layers = [i for i, layer_type in enumerate(config.layer_types) if layer_type == kind]
        found.append(by_type[kind](index=index, layer_indices=layers, **given))
    return tuple(found)


@pytest.mark.parametrize("name", SIZES)
def test_sectors_stay_small_at_released_sizes(name):
    model_type, values, states, sector = SIZES[name]
    full, linear = allocators(AutoConfig.for_model(model_type, **values), 256)
    assert linear.pages_per_block * linear.bytes_per_page == states
    assert states <= linear.bytes_per_block <= 1.125 * states
    assert lcm(full.bytes_per_block, linear.bytes_per_block, 128) == sector
    unpadded = lcm(full.bytes_per_block, states, 128)
    assert unpadded > 5 * sector  # what it would be without padding
    # The cache plans index tables and masks for the layer type with most tokens in a sector: full attention.
    per_sector = [sector // x.bytes_per_block * x.tokens_per_page for x in (full, linear)]
    assert per_sector[0] >= per_sector[1]
    # The fast path of decoding serves requests as long as full attention does.
    assert linear.tokens_per_page == full.tokens_per_page


@pytest.mark.parametrize("needed", [128, 1000 * 128, 77856768, 10752, 2**20 + 128])
@pytest.mark.parametrize("unit", [128, 2048, 6291456, 3 * 2**20, 128 * 7919])
def test_any_two_sizes_have_a_sector(needed, unit):
    size, blocks, units = paged.block_layout(needed, unit)
    assert size >= needed and size * blocks == unit * units and size % 128 == 0
    assert lcm(size, unit) <= unit * units <= 64 * max(unit, 2 * needed)


def test_slots_are_views_that_do_not_overlap():
    """Every layer's state of every slot is memory of its own, inside its block, beside nothing else."""
    model = tiny.model("qwen3_next")
    hf_gdn.patch()
    with runs.manager(model) as made:
        runs.results(made, [made.add_request([3, 4, 5])])
        cache = runs.cache_of(made)
    allocator, written = cache.cache_allocators[paged.LINEAR], 0
    cache.cache_tensor.zero_()
    for layer in allocator.layer_indices:
        for pool in paged.pools(cache, layer):
            assert (pool.data_ptr() - cache.cache_tensor.data_ptr()) % 128 == 0
            assert pool.stride(0) * pool.itemsize == allocator.bytes_per_block
            assert pool[0].is_contiguous()
            assert pool.count_nonzero() == 0, "another layer's states are here too"
            pool.fill_(1.0)
            written += pool.numel()
    floats = cache.cache_tensor.view(torch.float32)
    assert (floats == 1.0).sum() == written
    assert len(paged.pools(cache, 0)[0]) * allocator.bytes_per_block == len(cache.cache_tensor)


def test_a_request_that_is_alone_holds_one_slot():
    model = tiny.model("qwen3_next")
    hf_gdn.patch()
    with runs.manager(model, num_blocks=20) as made:
        runs.results(made, [made.add_request([3, 4, 5])])
        cache = runs.cache_of(made)
    allocator = cache.cache_allocators[paged.LINEAR]
    cache.pool.allocate_sector(allocator.index)
    assert allocator.needs_new_blocks("a", 0, 1) == allocator.needs_new_blocks("a", 0, 10_000) == 1
    allocator.allocate_cache_to_request("a", 0, 1)
    (slot,) = allocator.get_write_indices("a", 0, 1)
    assert allocator.needs_new_blocks("a", 1, 1) == 0 and slot >= 2 * allocator.blocks_per_sector
    allocator.allocate_cache_to_request("a", 1, 1)
    assert allocator.get_write_indices("a", 5, 1) == [slot]
    allocator.free_blocks("a")
    runs.assert_nothing_held(cache)


def test_a_batch_of_the_fast_decode_path_finds_slots_in_the_block_table():
    """What a GPU with flash attention gets: rows of a table instead of indices, unused ones are -1."""
    model = tiny.model("qwen3_next")
    hf_gdn.patch()
    with runs.manager(model) as made:
        runs.results(made, [made.add_request([3, 4, 5])])
        cache = runs.cache_of(made)
    allocator = cache.cache_allocators[paged.LINEAR]
    cache.pool.allocate_sector(allocator.index)
    table = torch.full((2, 4, 3), -1, dtype=torch.int32)
    for row, name in enumerate("ab"):
        allocator.allocate_cache_to_request(name, 7, 1)
        allocator.fill_block_table(name, 7, 1, table[allocator.index, row])
    held = [allocator.block_table[name][0] for name in "ab"]
    starts = torch.tensor([0, 1, 2, 2, 2])
    arguments = dict(
        cu_seq_lens_q=starts, cu_seq_lens_k={"full_attention": starts * 8, paged.LINEAR: starts}, block_table=table,
        write_index=[], max_length_q=1,
    )  # fmt: skip
    batch = paged.batch_of(cache, arguments, tokens=4)
    assert batch.single and batch.slots.tolist() == [*held, *[allocator.write_trash_index] * 2]
    assert batch.begun.tolist() == [True, True, False, False]
