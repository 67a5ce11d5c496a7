"""Tokens taken back: as if they had never been; and what generate() makes of it: assistants.

The budget for logits and states is LAYER of hf_gdn/testing/tolerances.py.
"""

import copy
import pickle
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import hf_gdn
import hf_gdn.caches
from hf_gdn.caches import rollback
from hf_gdn.errors import SnapshotError
from hf_gdn.loading.models import ASSETS
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER
from tests import sampling
from tests import tiny_models as tiny


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


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_pickled_cache_goes_on_without_its_history(model, way, tmp_path):
    ids, _ = tiny.batch(1, 20)
    with hf_gdn.patched(strict=True):
        cache = recording(model)
        read(model, ids[:, :12], cache)
        cache.crop(-2)
        if way == "pickle":
            written = pickle.dumps(cache)
            loaded = pickle.loads(written)
        else:
            torch.save(cache, tmp_path / "cache.pt")
            loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
        with pytest.raises(RuntimeError, match="the layer has recorded 0"):
            loaded.crop(-1)
        assert torch.equal(read(model, ids[:, 10:], loaded), read(model, ids[:, 10:], cache))
        loaded.crop(-3)  # a new history from there on
        cache.crop(-3)
        assert all(torch.equal(x, y) for x, y in zip(states(loaded), states(cache)))


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


# -------------------------------------------------------------------------------------------------------- interruptions


class Interrupts:
    """Raises KeyboardInterrupt where a module of a model is called."""

    def __init__(self, module):
        self.handle = module.register_forward_pre_hook(self._raise)

    def _raise(self, *_):
        self.handle.remove()
        raise KeyboardInterrupt("injected")


def refuses(model, cache, ids):
    before = [state.clone() for state in states(cache) if state is not None]
    for call in (lambda: cache.crop(-1), lambda: cache.crop(0), lambda: read(model, ids[:, :1], cache)):
        with pytest.raises(RuntimeError, match="was interrupted, so its layers differ in length"):
            call()
    for call in (hf_gdn.caches.snapshot, lambda cache: hf_gdn.caches.fork(cache, 1)):
        with pytest.raises(SnapshotError, match="was interrupted"):
            call(cache)
    assert all(torch.equal(x, y) for x, y in zip([s for s in states(cache) if s is not None], before))


@pytest.mark.parametrize("held", [0, 12])
@pytest.mark.parametrize("at", [1, 3, "lm_head"])
def test_an_interrupted_forward_leaves_a_cache_that_is_refused(model, held, at):
    """Some layers have read the tokens and some have not. After the last layer all have, so nothing is wrong."""
    ids, _ = tiny.batch(1, 30)
    with hf_gdn.patched(strict=True):
        cache = recording(model)
        if held:
            read(model, ids[:, :held], cache)
            kept = hf_gdn.caches.snapshot(cache)
        module = model.lm_head if at == "lm_head" else model.get_decoder().layers[at]
        with pytest.raises(KeyboardInterrupt):
            Interrupts(module)
            read(model, ids[:, held : held + 3], cache)
        if at == "lm_head":
            cache.crop(-3)
        else:
            refuses(model, cache, ids)
            if held:
                hf_gdn.caches.restore(cache, kept)
            else:
                for layer in cache.layers:
                    layer.reset()
                cache = recording(model) if cache.get_seq_length() else cache
        got = read(model, ids[:, held : held + 5], cache)
        cache.crop(-2)
        wanted = read(model, ids[:, : held + 5], recording(model))[:, held:]
        assert_close("logits", got, wanted, LAYER)


def test_forwards_without_a_draft_are_not_recorded_in_assisted_decoding(model):
    """Their tokens cannot be rolled back; those of the next draft can. An interrupt is noticed there too."""
    ids, _ = tiny.batch(1, 30)
    with hf_gdn.patched(strict=True), rollback.assisted():
        cache = recording(model)
        rollback.record_forwards(False)
        read(model, ids[:, :12], cache)
        assert cache.is_croppable
        read(model, ids[:, 12:13], cache)
        cache.crop(0)
        with pytest.raises(RuntimeError, match="rolls back 1 tokens, the layer has recorded 0"):
            cache.crop(-1)
        rollback.record_forwards(True)
        read(model, ids[:, 20:23], cache)
        cache.crop(-3)
        got = read(model, ids[:, 13:16], cache)
        wanted = read(model, ids[:, :16], recording(model))[:, 13:]
        assert_close("logits", got, wanted, LAYER)
        rollback.record_forwards(False)
        for _ in range(2):
            read(model, ids[:, 16:17], cache)
        with pytest.raises(KeyboardInterrupt):
            Interrupts(model.get_decoder().layers[3])
            read(model, ids[:, 17:18], cache)
        refuses(model, cache, ids)


def test_an_interrupt_before_the_first_layer_changes_nothing(model):
    ids, _ = tiny.batch(1, 30)
    with hf_gdn.patched(strict=True):
        cache = recording(model)
        read(model, ids[:, :12], cache)
        with pytest.raises(KeyboardInterrupt):
            Interrupts(model.get_decoder().layers[0])
            read(model, ids[:, 12:14], cache)
        cache.crop(-2)
        assert cache.get_seq_length() == 10


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_crop_leaves_a_cache_that_is_refused(model, at, monkeypatch):
    ids, _ = tiny.batch(1, 30)
    with hf_gdn.patched(strict=True):
        cache = recording(model)
        read(model, ids[:, :12], cache)

        def interrupt(_):
            raise KeyboardInterrupt("injected")

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cache.layers[at], "crop", interrupt)
            cache.crop(-2)
        vars(cache.layers[at]).pop("crop", None)
        refuses(model, cache, ids)


def test_a_crop_that_one_layer_refuses_changes_no_layer(model):
    ids, _ = tiny.batch(1, 30)
    with hf_gdn.patched(strict=True):
        cache = recording(model)
        read(model, ids[:, :12], cache)
        rollback.discard(cache.layers[2])
        before = [state.clone() for state in states(cache)]
        with pytest.raises(RuntimeError, match="the layer has recorded 0"):
            cache.crop(-2)
        assert cache.get_seq_length() == 12
        assert all(torch.equal(x, y) for x, y in zip(states(cache), before))


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


def test_a_static_cache_that_records(model, family):
    """Tokens are rolled back; single tokens, which transformers gives no mask, do not attend to empty slots."""
    ids, _ = tiny.batch(1, 40)
    with hf_gdn.patched(strict=True):
        if not hasattr(StaticLayer, "crop"):  # before 5.24
            with pytest.raises(ValueError, match="not supported with Static cache"):
                generate(model, repetitive(), prompt_lookup_num_tokens=3, cache_implementation="static")
            return
        cache = StaticCache(config=model.config, max_cache_len=64)
        cache.activate_past_recording()
        read(model, ids[:, :12], cache)
        read(model, ids[:, 20:25], cache)
        if family == "lara_mini":  # it has read more than a sliding window
            with pytest.raises(RuntimeError, match="whose window has moved on cannot be cropped"):
                cache.crop(-5)
            with pytest.raises(ValueError, match="requires a cache that can be cropped"):
                generate(model, repetitive(), prompt_lookup_num_tokens=3, cache_implementation="static")
            return
        cache.crop(-5)
        parts = [read(model, part, cache) for part in ids[:, 12:20].split([1, 3, 1, 1, 2], 1)]
        wanted = read(model, ids[:, :20], DynamicCache(config=model.config))[:, 12:]
        assert_close("logits", torch.cat(parts, 1), wanted, LAYER)
        assert not cache.is_compileable
        wanted = generate(model, repetitive())
        for drafts in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=tiny.model(family, seed=7))):
            assert torch.equal(generate(model, repetitive(), cache_implementation="static", **drafts), wanted)


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
    """Of pairs of tokens, against the original's exact probabilities."""
    model, draft = (
        sampling.sharpened(
            tiny.model(rule, seed=seed, vocab_size=sampling.VOCABULARY, pad_token_id=None, eos_token_id=None)
        )
        for seed in (0, 3)
    )
    exact = sampling.exact_pairs(model)
    drafts = {"assistant_model": draft} if how == "assistant" else {"prompt_lookup_num_tokens": 2}
    with hf_gdn.patched(rule, strict=True):
        sampling.assert_sampled_from(exact, model, **drafts)
