"""Prefixes are read once: tokens that go through the model are counted, results are those of one full forward."""

import random

import pytest
import torch
from transformers import DynamicCache, StaticCache

import hf_gdn
from hf_gdn import caches
from hf_gdn.caches import PrefixCache
from hf_gdn.caches.snapshots.layers import GROWING
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER
from tests import tiny_models as tiny
from tests.caches import cache_contents


def text(rows, tokens, seed=0):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def full(model, ids, **kwargs):
    """Last logits of the original model, which reads all of it at once, without a cache."""
    with hf_gdn.unpatched(), torch.no_grad():
        return model(ids, use_cache=False, logits_to_keep=1, **kwargs).logits


def answer(model, ids, cache, **kwargs):
    """Last logits when the rest of `ids` is read after what the cache holds."""
    with torch.no_grad():
        rest = ids[:, int(cache.get_seq_length()) :]
        return model(rest, **tiny.given(cache), logits_to_keep=1, **kwargs).logits


class Counter:
    """Counts the tokens that a model reads."""

    def __init__(self, model):
        self.tokens = 0
        model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _, args, kwargs):
        ids = kwargs.get("input_ids")
        self.tokens += (kwargs["inputs_embeds"] if ids is None else ids).shape[1]

    def since(self) -> int:
        seen, self.tokens = self.tokens, 0
        return seen


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_ten_thousand_shared_tokens_are_read_once(family):
    """1e-5 holds here too: rounding does not build up along a text, since states decay and attention averages."""
    hf_gdn.patch(strict=True)
    model = tiny.model(family, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    counter, prefixes = Counter(model), PrefixCache(model, every=1000)
    shared, other = text(1, 10_000), text(1, 50, seed=1)
    first, second = torch.cat((shared, text(1, 30, seed=2)), 1), torch.cat((shared, other), 1)
    prefixes.prefill(first)
    assert counter.since() == 10_029
    cache = prefixes.prefill(second)
    assert counter.since() == 49
    assert (prefixes.tokens_read, prefixes.tokens_reused) == (10_029 + 49, 10_000)
    assert_close("second", answer(model, second, cache), full(model, second), LAYER)
    counter.since()
    model.generate(second, **tiny.given(prefixes.prefill(second)), max_new_tokens=1, pad_token_id=0)
    assert counter.since() == 1  # the last token of the prompt, and nothing else


def test_every_family_answers_as_without(family):
    hf_gdn.patch(strict=True)
    model = tiny.model(family)
    counter, prefixes = Counter(model), PrefixCache(model, every=32)
    shared = text(1, 70)
    for seed, (size, read) in enumerate([(20, 89), (9, 14), (40, 45)]):  # of 70 tokens 64 are found again
        ids = torch.cat((shared, text(1, size, seed + 1)), 1)
        kwargs = dict(max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
        wanted = model.generate(ids, **kwargs)
        counter.since()
        cache = prefixes.prefill(ids)
        assert counter.since() == read
        again = prefixes.prefill(ids, kwargs["attention_mask"])
        assert counter.since() == 0
        assert torch.equal(model.generate(ids, **tiny.given(again), **kwargs), wanted)
        assert_close("logits", answer(model, ids, cache), full(model, ids), LAYER)


def test_a_conversation_goes_on(family):
    """Turn by turn, only what is new is read, answers included."""
    hf_gdn.patch(strict=True)
    model = tiny.model(family)
    counter, prefixes, ids = Counter(model), PrefixCache(model), text(1, 40)
    for turn in range(3):
        kwargs = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
        out = model.generate(ids, **tiny.given(prefixes.prefill(ids)), return_dict_in_generate=True, **kwargs)
        assert counter.since() == (40 if turn == 0 else 12) + 5
        assert torch.equal(out.sequences, model.generate(ids, **kwargs))
        prefixes.add(out.sequences, tiny.cache_of(out))
        ids = torch.cat((out.sequences, text(1, 11, seed=turn + 1)), 1)
        counter.since()
    assert len(prefixes) == 6


def test_what_is_kept_is_independent(family):
    """Of the caches that come out, of those that go in."""
    hf_gdn.patch()
    model = tiny.model(family)
    ids, prefixes = text(1, 50), PrefixCache(model, every=20)
    first, second = prefixes.prefill(ids), prefixes.prefill(ids)
    kept = cache_contents.memory(t for n in prefixes._root.below() for parts in n.held.layers for t in parts.values())
    for cache in (first, second):
        assert not kept & cache_contents.memory(cache_contents.tensors(cache).values())
    for tensor in cache_contents.tensors(first).values():
        tensor.zero_()
    assert_close("second", answer(model, ids, second), full(model, ids), LAYER)
    assert_close("third", answer(model, ids, prefixes.prefill(ids)), full(model, ids), LAYER)


def test_a_static_cache_is_filled(family):
    hf_gdn.patch(strict=True)
    model = tiny.model(family)
    ids, prefixes = text(1, 50), PrefixCache(model, every=20)
    for _ in range(2):
        cache = StaticCache(config=model.config, max_cache_len=56)
        assert prefixes.prefill(ids, cache=cache) is cache and cache.get_seq_length() == 49
        assert_close("logits", answer(model, ids, cache), full(model, ids), LAYER)
    assert prefixes.tokens_read == 49


def test_rows_share_what_all_begin_with(family):
    hf_gdn.patch(strict=True)
    model = tiny.model(family)
    counter, prefixes = Counter(model), PrefixCache(model, every=16)
    ids = torch.cat((text(1, 40).expand(3, -1), text(3, 10, seed=1)), 1)
    mask = torch.ones_like(ids)
    for pads, shared in ((0, 40), (15, 35)):  # padding on the right of one row, longer than what differs
        mask[2, 50 - pads :] = 0
        counter.since()
        cache = prefixes.prefill(ids, mask)
        assert cache.get_seq_length() == shared
        assert counter.since() == (40 if pads == 0 else 3)
        with torch.no_grad():
            got = model(ids[:, shared:], **tiny.given(cache), attention_mask=mask).logits[mask[:, shared:].bool()]
            wanted = [model(ids[row : row + 1, : mask[row].sum()]).logits[0, shared:] for row in range(3)]
        assert_close("logits", got, torch.cat(wanted), LAYER)
    mask[1, :3] = 0  # padding on the left: nothing is shared
    assert prefixes.prefill(ids, mask).get_seq_length() == 0
    assert prefixes.prefill(ids[:, :1]).get_seq_length() == 0  # its one token is the model's to answer


# ------------------------------------------------------------------------------------------------------------- budget


def _sizes(model):
    """Bytes of the states of one row, full sliding windows among them, and of the keys and values of one token."""
    ids, cache = text(1, 20), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **tiny.given(cache))
    found = caches.snapshot(cache)
    grow = sum(t.nbytes for parts in found.layers for name, t in parts.items() if name in GROWING)
    return found.nbytes - grow, grow // 20


def test_nested_prefixes_hold_nothing_twice(family):
    model = tiny.model(family)
    states, token = _sizes(model)
    prefixes = PrefixCache(model, every=20)
    prefixes.prefill(text(1, 71))
    assert (len(prefixes), prefixes.nbytes) == (4, 4 * states + 70 * token)
    kept = cache_contents.memory(t for n in prefixes._root.below() for parts in n.held.layers for t in parts.values())
    assert len(kept) == sum(t.numel() > 0 for n in prefixes._root.below() for p in n.held.layers for t in p.values())
    prefixes.clear()
    assert (len(prefixes), prefixes.nbytes) == (0, 0)


def test_what_was_used_least_recently_goes_first():
    hf_gdn.patch()
    model = tiny.model("qwen3_next")
    states, token = _sizes(model)
    prefixes = PrefixCache(model, 3 * (states + 20 * token), every=20)
    prompts = [text(1, 21, seed) for seed in range(4)]
    for ids in prompts[:3]:
        prefixes.prefill(ids)
    prefixes.prefill(prompts[0])
    assert len(prefixes) == 3 and prefixes.tokens_read == 60
    prefixes.prefill(prompts[3])  # takes the place of the second
    assert len(prefixes) == 3 and prefixes.tokens_read == 80
    for index, read in ((2, 0), (0, 0), (3, 0), (1, 20)):
        before = prefixes.tokens_read
        prefixes.prefill(prompts[index])
        assert prefixes.tokens_read - before == read, index


@pytest.mark.parametrize("pieces", [0, 1, 2.5])
def test_a_prompt_beyond_the_budget(pieces):
    """Its beginning is kept as far as there is room, and it is read all the same."""
    hf_gdn.patch()
    model = tiny.model("kimi_linear")
    states, token = _sizes(model)
    prefixes = PrefixCache(model, int(pieces * (states + 20 * token)), every=20)
    ids = text(1, 90)
    for _ in range(2):
        assert_close("logits", answer(model, ids, prefixes.prefill(ids)), full(model, ids), LAYER)
        assert len(prefixes) == int(pieces) and prefixes.nbytes <= prefixes.max_bytes
    assert prefixes.tokens_reused == 20 * int(pieces)


def test_many_prompts_in_little_room():
    """Prompts that branch anywhere, against a list of what may be found: reading and accounts are right throughout."""
    hf_gdn.patch()
    model = tiny.model("qwen3_next", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    states, token = _sizes(model)
    rng = random.Random(0)
    prefixes, seen = PrefixCache(model, 8 * (states + 12 * token), every=8), [text(1, 60)]
    reused = []
    for _ in range(20):
        base = rng.choice(seen[-6:])[:, :60]
        ids = torch.cat((base[:, : rng.randrange(base.shape[1] + 1)], text(1, rng.randrange(1, 30), len(seen))), 1)
        seen.append(ids)
        before = prefixes.tokens_reused
        cache = prefixes.prefill(ids)
        reused.append(prefixes.tokens_reused - before)
        nodes = list(prefixes._root.below())
        assert prefixes.nbytes == sum(p.nbytes for n in nodes for parts in n.held.layers for p in parts.values())
        assert prefixes.nbytes <= prefixes.max_bytes
        assert all(node.parent.children[node.ids] is node and node.used <= prefixes._clock for node in nodes)
        assert_close("logits", answer(model, ids, cache), full(model, ids), LAYER)
    assert sum(size > 0 for size in reused) > 5


def test_longest_common_beginnings_are_found():
    """Without a limit on room, against brute force over all that has been read."""
    hf_gdn.patch()
    model = tiny.model("qwen3_next", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    rng, prefixes, ends = random.Random(1), PrefixCache(model, every=4), set()
    for _ in range(60):
        ids = torch.tensor([[rng.randrange(3, 5) for _ in range(rng.randrange(1, 16))]])
        row = tuple(ids[0].tolist())
        wanted = max((len(end) for end in ends if row[:-1][: len(end)] == end), default=0)
        before = prefixes.tokens_reused
        prefixes.prefill(ids)
        assert prefixes.tokens_reused - before == wanted
        ends |= {row[:size] for size in range(1, len(row)) if size % 4 == 0 or size == len(row) - 1}


def test_bad_input():
    model = tiny.model("qwen3_next")
    for kwargs in (dict(max_bytes=-1), dict(every=0), dict(every=-5)):
        with pytest.raises(ValueError, match="max_bytes ≥ 0 and every ≥ 1"):
            PrefixCache(model, **kwargs)
    prefixes, ids = PrefixCache(model), text(1, 10)
    for wrong in (ids[0], ids[:, :0], ids[None]):
        with pytest.raises(ValueError, match=r"input_ids must be \[B, T\]"):
            prefixes.prefill(wrong)
    used = prefixes.prefill(ids)
    with pytest.raises(ValueError, match="must be empty, it holds 9 tokens"):
        prefixes.prefill(ids, cache=used)
    small = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(caches.SnapshotError, match="room for 8 tokens"):
        prefixes.prefill(ids, cache=small)
    assert small.get_seq_length() == 0
    for wrong in (ids[:, :8], ids[0], ids.expand(2, -1)):
        with pytest.raises(ValueError, match=r"\[1, T\] with T ≥ 9"):
            prefixes.add(wrong, used)


# -------------------------------------------------------------------------------------------------------------- vision

VISION = pytest.mark.parametrize("family", [pytest.param(name, id=name) for name in ("qwen3_5", "qwen4_exp")])
GREEDY = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)


@VISION
def test_positions_of_an_image_do_not_reach_a_later_prefix(family):
    """The model adds the position offset of the last image to what is read behind a cache, text without images too."""
    model, ids = tiny.with_vision(family), text(1, 40).clamp(max=110)
    image = tiny.with_image([5, 6], [7, 8, 9])
    with hf_gdn.patched(family, strict=True):
        wanted, fresh = model.generate(ids, **GREEDY), PrefixCache(model, every=8).prefill(ids)
        model.generate(**image, **GREEDY)
        assert model.model.rope_deltas.any()
        prefixes = PrefixCache(model, every=8)
        for _ in range(2):  # read, then from snapshots
            found = prefixes.prefill(ids)
            for one, other in zip(caches.snapshot(found).layers, caches.snapshot(fresh).layers):
                assert all(torch.equal(one[name], other[name]) for name in other)
            assert torch.equal(model.generate(ids, **tiny.given(found), **GREEDY), wanted)
            model.generate(**image, **GREEDY)


@VISION
def test_a_prefix_ends_before_the_first_image(family):
    model, before = tiny.with_vision(family), text(1, 20).clamp(max=110)[0].tolist()
    first, second = (tiny.with_image(before, [7, 8, 9], seed) for seed in (0, 1))
    with hf_gdn.patched(family, strict=True):
        wanted = [model.generate(**prompt, **GREEDY) for prompt in (first, second)]
        assert not torch.equal(*wanted)
        prefixes = PrefixCache(model)
        for prompt, expected in zip((first, second), wanted):
            found = prefixes.prefill(prompt["input_ids"])
            assert found.get_seq_length() == len(before) + 1
            assert torch.equal(model.generate(**prompt, **tiny.given(found), **GREEDY), expected)
        assert prefixes.tokens_reused == len(before) + 1
        with pytest.raises(ValueError, match="the cache holds images, videos or sounds"):
            prefixes.add(wanted[1], found)
