"""Assisted decoding from a cache that already holds text gives the tokens of plain decoding, or is refused."""

import pytest
import torch
from transformers import DynamicCache

import hf_gdn
from hf_gdn.caches import PrefixCache
from hf_gdn.drafting import continued
from hf_gdn.upstream import seams
from tests import tiny_models as tiny

PROMPT = torch.tensor([[5, 6, 7, 8, 9] * 6 + [5, 6, 7]])
NEW = 24
GIVEN = dict(max_new_tokens=NEW, pad_token_id=0, do_sample=False, eos_token_id=None)
LOOKUP = dict(prompt_lookup_num_tokens=5)


@pytest.fixture
def model(family):
    built = tiny.lively(family)
    built.generation_config.eos_token_id = None
    return built


def held(model, tokens: int) -> DynamicCache:
    """A cache with the first tokens of the prompt."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT[:, :tokens], **tiny.given(cache))
    return cache


def new_tokens(out: torch.Tensor) -> list[int]:
    return out[0, -NEW:].tolist()


class Forwards:
    """Counts the tokens of each forward of a model."""

    def __init__(self, model):
        self.sizes = []
        model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _, args, kwargs):
        embeds = kwargs.get("inputs_embeds")
        self.sizes.append((kwargs["input_ids"] if embeds is None else embeds).shape[1])


@pytest.mark.parametrize("drafts", ["lookup", "assistant"])
@pytest.mark.parametrize("tokens", [20, 32])
def test_continues_from_the_cache(model, family, drafts, tokens):
    drafting = LOOKUP if drafts == "lookup" else dict(assistant_model=tiny.lively(family, seed=3))
    with hf_gdn.patched(strict=True):
        wanted = new_tokens(model.generate(PROMPT, **GIVEN))
        assert len(set(wanted)) > NEW // 2
        cache = held(model, tokens)
        counted = Forwards(model)
        out = model.generate(PROMPT, **tiny.given(cache), **drafting, **GIVEN)
    assert new_tokens(out) == wanted
    assert counted.sizes[0] <= PROMPT.shape[1] - tokens + 20  # the rest of the prompt, and a draft of 20 at most
    assert cache.get_seq_length() == PROMPT.shape[1] + NEW - 1


def test_a_prefix_cache_and_a_second_turn(model):
    with hf_gdn.patched(strict=True):
        prefixes = PrefixCache(model)
        wanted = model.generate(PROMPT, **GIVEN)
        for _ in range(2):  # the second time from a snapshot
            cache = prefixes.prefill(PROMPT)
            assert torch.equal(model.generate(PROMPT, **tiny.given(cache), **LOOKUP, **GIVEN), wanted)
        text = torch.cat((wanted, PROMPT[:, :9]), 1)
        second = model.generate(text, **GIVEN)
        assert torch.equal(model.generate(text, **tiny.given(cache), **LOOKUP, **GIVEN), second)


@pytest.mark.parametrize("family", ["qwen3_next", "glm5_next"])
def test_embeddings_and_the_new_tokens_alone(family):
    model = tiny.lively(family)
    with hf_gdn.patched(strict=True):
        wanted = new_tokens(model.generate(PROMPT, **GIVEN))
        embeds = model.get_input_embeddings()(PROMPT).detach()
        assert new_tokens(model.generate(inputs_embeds=embeds, **LOOKUP, **GIVEN)) == wanted
        given = dict(inputs_embeds=embeds, **tiny.given(held(model, 20)))
        assert new_tokens(model.generate(**given, **LOOKUP, **GIVEN)) == wanted
        given = dict(attention_mask=torch.ones_like(PROMPT), **tiny.given(held(model, 20)))
        assert new_tokens(model.generate(PROMPT[:, 20:], **given, **LOOKUP, **GIVEN)) == wanted


def refused_all_held(model):
    return dict(input_ids=PROMPT), held(model, PROMPT.shape[1]), "holds 33 tokens needs a prompt of .* got 33"


def refused_shorter_prompt(model):
    return dict(input_ids=PROMPT[:, :10]), held(model, 20), "holds 20 tokens needs a prompt of .* got 10"


def refused_shorter_embeddings(model):
    embeds = model.get_input_embeddings()(PROMPT[:, :10]).detach()
    return dict(inputs_embeds=embeds), held(model, 20), "holds 20 tokens needs a prompt of .* got 10"


def refused_padding_that_would_be_cut(model):
    mask = torch.ones_like(PROMPT)
    mask[:, :3] = 0
    given = dict(input_ids=PROMPT[:, 20:], attention_mask=mask)
    return given, held(model, 20), "needs input_ids as long as the attention_mask, 33 tokens; got 13"


@pytest.mark.parametrize(
    "case",
    [refused_all_held, refused_shorter_prompt, refused_shorter_embeddings, refused_padding_that_would_be_cut],
    ids=lambda case: case.__name__,
)
def test_refused_before_anything_is_read(case):
    model = tiny.lively("qwen3_next")
    with hf_gdn.patched(strict=True):
        given, cache, text = case(model)
        tokens, counted = cache.get_seq_length(), Forwards(model)
        with pytest.raises(ValueError, match=text):
            model.generate(**given, **tiny.given(cache), **LOOKUP, **GIVEN)
    assert not counted.sizes and cache.get_seq_length() == tokens


def test_drafts_that_need_the_whole_prompts_outputs_are_refused(monkeypatch):
    class FromOutputs:
        requires_model_outputs = True

    monkeypatch.setattr(seams.generation_class(), seams.CANDIDATES, lambda *args, **kwargs: FromOutputs())
    model = tiny.lively("qwen3_next")
    with hf_gdn.patched(strict=True):
        counted = Forwards(model)
        cache = held(model, 20)
        counted.sizes.clear()
        with pytest.raises(ValueError, match="FromOutputs drafts from .* holds 20 tokens of it, so pass an"):
            model.generate(PROMPT, **tiny.given(cache), **LOOKUP, **GIVEN)
    assert not counted.sizes and continued._continued.get() is None
