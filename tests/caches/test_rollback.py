"""Tokens taken back: as if they had never been; and what generate() makes of it: assistants.

The budget for logits and states is LAYER of hf_gdn/testing/tolerances.py.
"""

import copy
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

import hf_gdn
import hf_gdn.caches
from hf_gdn.caches import rollback
from hf_gdn.loading.models import ASSETS
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER
from tests import tiny


@pytest.fixture
def model(family):
    return tiny.model(family)


def read(model, ids, cache):
    with torch.no_grad():
        return model(ids, **tiny.given(cache)).logits


def recording(model) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


def states(cache):
    return [x for layer in cache.layers[:3] for x in (layer.conv_states[0], layer.recurrent_states[0])]


@pytest.mark.parametrize("refused", [1, 3, 5])
@pytest.mark.parametrize("sizes", [[5], [1] * 5, [2, 3], [20]], ids=str)
def test_crop_and_read_again(model, sizes, refused):
    ids, _ = tiny.batch(1, 60)
    others, _ = tiny.batch(1, 60, seed=1)
    total = sum(sizes)
    with hf_gdn.patched(strict=True):
        cache = recording(model)
        read(model, ids[:, :30], cache)
        cache.crop(0)
        start = 30
        for size in sizes:
            read(model, ids[:, start : start + size], cache)
            start += size
        addresses = [state.data_ptr() for state in states(cache)]
        cache.crop(-refused)
        assert cache.get_seq_length() == 30 + total - refused
        kept = DynamicCache(config=model.config)
        read(model, ids[:, : 30 + total - refused], kept)
        for got, wanted in zip(states(cache), states(kept)):
            assert_close("state", got, wanted, LAYER)
        got = [read(model, others[:, :1], cache), read(model, others[:, 1:20], cache)]
        wanted = read(model, torch.cat((ids[:, : 30 + total - refused], others[:, :20]), 1), None)[:, -20:]
        assert [state.data_ptr() for state in states(cache)] == addresses
    assert_close("logits", torch.cat(got, 1), wanted, LAYER)


@pytest.mark.parametrize("seed", range(3))
def test_crops_beyond_the_last_crop(model, seed):
    """A walk to and fro, as universal assistants go: states are those of reading what is left, logits as well."""
    if any(getattr(layer, "is_sliding", False) for layer in recording(model).layers):
        pytest.skip("transformers' sliding-window layers roll back to the last crop at most")
    dice, text, beyond = random.Random(seed), [], False
    with hf_gdn.patched(strict=True):
        cache = recording(model)
        for _ in range(25):
            size = dice.choice([1, 1, 2, 7, 20])
            new = [dice.randrange(1, 64) for _ in range(size)]
            text += new
            got = read(model, torch.tensor([new]), cache)
            past = rollback.history_of(cache.layers[0])
            assert beyond or past.max_rollback >= min(len(text), rollback.RECORDED)
            taken = dice.randrange(min(past.max_rollback, size + rollback.RECORDED) + 1) if dice.random() < 0.7 else 0
            beyond |= taken > size
            cache.crop(-taken if seed else torch.tensor(-taken))  # as generate() does
            wanted = read(model, torch.tensor([text]), None)[:, -size:]
            assert_close("logits", got, wanted, LAYER)
            text = text[: len(text) - taken]
            assert cache.get_seq_length() == len(text)
            if text:
                kept = DynamicCache(config=model.config)
                read(model, torch.tensor([text]), kept)
                for one, other in zip(states(cache), states(kept)):
                    assert_close("state", one, other, LAYER)
            spans = starts(rollback.history_of(cache.layers[0]))
            assert len(spans) <= 3 and sum(map(len, spans)) < 3 * rollback.RECORDED + 20


def starts(past) -> list[rollback.History]:
    return [] if past is None else [past, *starts(past.earlier)]


@pytest.mark.parametrize("length", [3, 40, 300, 700])
def test_tokens_of_the_prompt_can_be_taken_back(model, length):
    """As assisted decoding does: prompt and first candidates are one forward."""
    ids, _ = tiny.batch(1, length + 5)
    with hf_gdn.patched(strict=True):
        cache = recording(model)
        assert_close("recording", read(model, ids[:, :length], cache), read(model, ids[:, :length], None), LAYER)
        cache.crop(-3)
        if length == 3:
            assert not cache.layers[0].has_previous_state[0]
        got = read(model, ids[:, length - 3 :], cache)
        wanted = read(model, ids, None)[:, length - 3 :]
    assert_close("logits", got, wanted, LAYER)


@pytest.mark.parametrize("refused", [1, 3, 6])
def test_padding_in_a_single_row(model, refused):
    """Of a layer: places are counted, holes and all."""
    layer, x = tiny.mixer(model), torch.randn(1, 20, 32)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 0]])
    with hf_gdn.patched(strict=True), torch.no_grad():
        cache, kept = recording(model), DynamicCache(config=model.config)
        for a, b in ((0, 9), (9, 12), (12, 14), (14, 16)):
            got = layer(x[:, a:b], **tiny.layer_given(layer, cache), attention_mask=mask[:, a:b])
            assert not got[:, mask[0, a:b] == 0].any()
        cache.layers[0].crop(-refused)
        layer(x[:, : 16 - refused], **tiny.layer_given(layer, kept), attention_mask=mask[:, : 16 - refused])
        for name, one, other in zip(("window", "state"), states_of(cache), states_of(kept)):
            assert_close(name, one, other, LAYER)


def states_of(cache):
    return cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]


def test_what_is_kept_does_not_grow(model):
    ids, _ = tiny.batch(1, 5)
    with hf_gdn.patched(strict=True):
        cache = recording(model)
        for _ in range(3 * rollback.RECORDED // 5 + 60):
            read(model, ids, cache)
        spans = starts(rollback.history_of(cache.layers[0]))
        assert len(spans) <= 3 and rollback.RECORDED <= spans[0].max_rollback <= 3 * rollback.RECORDED
        whole = copy.deepcopy(cache)
        cache.crop(-rollback.RECORDED)
        assert torch.isfinite(cache.layers[0].recurrent_states[0]).all()
        whole.crop(-rollback.RECORDED)  # a copy has a past of its own
        for got, wanted in zip(states(whole), states(cache)):
            assert torch.equal(got, wanted)


def test_more_than_was_recorded_is_refused_and_nothing_changed(model):
    ids, mask = tiny.batch(2, 20)
    with hf_gdn.patched():
        cache = DynamicCache(config=model.config)
        read(model, ids[:1], cache)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.layers[0].crop(-1)
        cache.activate_past_recording()
        read(model, ids[:1, :4], cache)
        before = [state.clone() for state in states(cache)]
        with pytest.raises(RuntimeError, match=r"crop\(-5\) rolls back 5 tokens, the layer has recorded 4"):
            cache.crop(-5)
        assert all(torch.equal(x, y) for x, y in zip(states(cache), before))
        cache.crop(-4)
        with pytest.raises(RuntimeError, match="the layer has recorded 0"):
            cache.crop(-1)
        # Padding is served, and not recorded.
        cache = recording(model)
        with torch.no_grad():
            model(ids, **tiny.given(cache), attention_mask=mask)
        with pytest.raises(RuntimeError, match="the layer has recorded 0"):
            cache.crop(-1)
        # Rows of another order are not those of the past.
        cache = recording(model)
        read(model, ids, cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(RuntimeError, match="the layer has recorded 0"):
            cache.crop(-1)


def test_reset_and_read_again(model):
    ids, _ = tiny.batch(1, 20)
    with hf_gdn.patched(strict=True):
        cache = recording(model)
        read(model, ids, cache)
        for layer in cache.layers[:3]:
            layer.reset()
        layer, mixer = cache.layers[0], tiny.mixer(model)
        x = torch.randn(1, 6, 32)
        with torch.no_grad():
            mixer(x, **tiny.layer_given(mixer, cache))
            layer.crop(-2)
            wanted = DynamicCache(config=model.config)
            mixer(x[:, :4], **tiny.layer_given(mixer, wanted))
    assert_close("state", layer.recurrent_states[0], wanted.layers[0].recurrent_states[0], LAYER)


def test_what_others_did_to_the_states_is_noticed(model):
    """The original without the patch, a snapshot put back: what was recorded before is not the past of that."""
    ids, _ = tiny.batch(1, 20)
    with hf_gdn.patched():
        cache = recording(model)
        read(model, ids, cache)
        kept = hf_gdn.caches.snapshot(cache)
        with hf_gdn.unpatched(), torch.no_grad():
            tiny.mixer(model)(torch.randn(1, 1, 32), **tiny.layer_given(tiny.mixer(model), cache))
        with pytest.raises(RuntimeError, match="the layer has recorded 0"):
            cache.layers[0].crop(-1)
        cache = recording(model)
        read(model, ids, cache)
        hf_gdn.caches.restore(cache, kept)
        with pytest.raises(RuntimeError, match="the layer has recorded 0"):
            cache.layers[0].crop(-1)


# --------------------------------------------------------------------------------------------------------- assistants


def generate(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=24, pad_token_id=0, do_sample=False, **kwargs)


def repetitive() -> torch.Tensor:
    return torch.tensor([[5, 6, 7, 8, 9] * 6])


def test_without_the_patch_assistants_are_refused(model):
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model, repetitive(), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_prompt_lookup_is_greedy(model, tokens):
    ids, _ = tiny.batch(1, 40)
    with hf_gdn.patched(strict=True):
        for prompt in (repetitive(), ids):
            wanted = generate(model, prompt)
            assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=tokens), wanted)


def test_a_static_cache_that_records_is_refused(model):
    """Older transformers refuse it; newer ones give its decode steps no mask, so that empty slots are attended to."""
    given = dict(prompt_lookup_num_tokens=3, cache_implementation="static")
    with hf_gdn.patched(strict=True):
        with pytest.raises(ValueError, match=r"not supported with Static cache|masked wrongly by transformers"):
            generate(model, repetitive(), **given)
        cache = StaticCache(config=model.config, max_cache_len=64)
        read(model, repetitive(), cache)  # which is fine as long as it does not record


@pytest.mark.parametrize("like", ["itself", "another"])
def test_an_assistant_of_the_same_kind_is_greedy(model, family, like):
    assistant = tiny.model(family) if like == "itself" else tiny.model(family, seed=7)
    with hf_gdn.patched(strict=True):
        wanted = generate(model, repetitive())
        assert torch.equal(generate(model, repetitive(), assistant_model=assistant), wanted)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model, repetitive(), assistant_model=assistant)


RULES = pytest.mark.parametrize("rule", ["qwen3_next", "kimi_linear"])


def embedded(rule):
    folder = ASSETS / f"{rule}-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # in 16 bits logits tie
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@RULES
@pytest.mark.parametrize("do_sample", [False, True], ids=["by text", "by vocabulary"])
def test_universal_assistants(rule, do_sample):
    """Of another tokenizer: transformers goes by way of text, or, when it samples, of the tokens both have."""
    (model, tokenizer), (draft, draft_tokenizer) = embedded(rule), embedded(rule)
    draft_tokenizer.add_tokens(["return self", "def __init__", "    if ", "import "])
    draft.resize_token_embeddings(len(draft_tokenizer))
    prompt = torch.tensor([tokenizer("import os\n\nclass A:\n    def __init__(self, a):\n")["input_ids"]])
    given = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=60, top_k=1, do_sample=do_sample)
    with hf_gdn.patched(rule, strict=True):
        wanted = model.generate(prompt, **given)
        assistant = dict(assistant_model=draft, tokenizer=tokenizer, assistant_tokenizer=draft_tokenizer)
        assert torch.equal(model.generate(prompt, **assistant, **given), wanted)


@RULES
@pytest.mark.parametrize("how", ["prompt_lookup", "assistant"])
def test_sampling_is_the_models_own_distribution(rule, how):
    """Of pairs of tokens, against the original's exact probabilities. chi^2 with 24 degrees of freedom is above 60 once
    in 10,000 times; seeds are fixed."""
    vocabulary, draws = 5, 200
    model, draft = (
        tiny.model(rule, seed=seed, vocab_size=vocabulary, pad_token_id=None, eos_token_id=None) for seed in (0, 3)
    )
    for each in (model, draft):
        each.generation_config.eos_token_id = None
        with torch.no_grad():  # logits far enough apart to tell distributions from each other
            each.lm_head.weight.mul_(12)
    prompt = torch.tensor([[0, 1, 2, 3, 4] * 4])
    pairs = torch.cartesian_prod(torch.arange(vocabulary), torch.arange(vocabulary))
    with torch.no_grad():
        logits = model(torch.cat((prompt.expand(len(pairs), -1), pairs), 1), use_cache=False).logits.double()
    first, second = logits[:, -3].log_softmax(-1), logits[:, -2].log_softmax(-1)
    exact = (first.gather(1, pairs[:, :1]) + second.gather(1, pairs[:, 1:])).exp().view(vocabulary, vocabulary)
    assert exact.sum().item() == pytest.approx(1, abs=1e-6) and exact.max() > 4 * exact.min()
    mask = torch.ones_like(prompt)  # or generate() takes token 0 for padding
    drafts = {"assistant_model": draft} if how == "assistant" else {"prompt_lookup_num_tokens": 2}
    counts = torch.zeros(vocabulary, vocabulary, dtype=torch.float64)
    with hf_gdn.patched(rule, strict=True):
        for seed in range(draws):
            torch.manual_seed(seed)
            out = model.generate(prompt, do_sample=True, top_k=0, max_new_tokens=2, attention_mask=mask, **drafts)
            counts[tuple(out[0, -2:])] += 1
    chi2 = ((counts - draws * exact).square() / (draws * exact)).sum().item()
    assert chi2 < 60, f"chi^2 {chi2:.1f}"
