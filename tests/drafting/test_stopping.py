"""Where a text ends or its reader goes away inside a draft: as in plain decoding."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StoppingCriteria, StoppingCriteriaList

import hf_gdn
from hf_gdn.loading.models import ASSETS
from tests import tiny_models as tiny

NEW = 24
DRAFTS = pytest.mark.parametrize("drafts", [dict(use_mtp=True), dict(prompt_lookup_num_tokens=8)], ids=str)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "qwen3_next-tiny", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "qwen3_next-tiny")


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer("import os\n\nclass Path:\n    def __init__(self):\n", return_tensors="pt").input_ids


@pytest.fixture(autouse=True)
def _patched():
    with hf_gdn.patched("qwen3_next", strict=True):
        yield


def generate(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **options)


class Last(StoppingCriteria):
    """Stops behind a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] == self.token


class Streamer:
    """Collects tokens; raises at one of the calls."""

    def __init__(self, fails_at=None):
        self.tokens, self.calls, self.fails_at = [], 0, fails_at

    def put(self, tokens):
        self.calls += 1
        if self.calls == self.fails_at:
            raise ConnectionError("gone")
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.tokens.append("end")


@DRAFTS
def test_criteria_are_asked_for_every_token(model, tokenizer, ids, drafts):
    plain = generate(model, ids)
    inside = 0
    for at in range(ids.shape[1], plain.shape[1]):
        found = {}
        for name, how in (("plain", {}), ("drafts", drafts)):
            streamer, cache = Streamer(), DynamicCache(config=model.config)
            criteria = StoppingCriteriaList([Last(int(plain[0, at]))])
            out = generate(
                model,
                ids,
                stopping_criteria=criteria,
                streamer=streamer,
                return_dict_in_generate=True,
                output_scores=True,
                **tiny.given(cache),
                **how,
            )
            assert len(criteria) == 1
            found[name] = out.sequences.tolist(), streamer.tokens, len(out.scores), cache.get_seq_length()
        assert found["drafts"] == found["plain"]
        inside += found["plain"][3] < plain.shape[1] - 1
    assert inside > NEW // 2
    stopped = generate(model, ids, stop_strings=["self"], tokenizer=tokenizer)
    assert stopped.shape[1] < plain.shape[1]
    assert torch.equal(generate(model, ids, stop_strings=["self"], tokenizer=tokenizer, **drafts), stopped)


@DRAFTS
@pytest.mark.parametrize("call", [2, 3, 5, 7])
def test_an_exception_between_forwards_leaves_no_draft_in_the_cache(model, ids, drafts, call):
    """A streamer is called between the forward that reads a draft and the `crop` of what was rejected."""
    wanted, cache, streamer = generate(model, ids), DynamicCache(config=model.config), Streamer(call)
    with pytest.raises(ConnectionError, match="gone"):
        generate(model, ids, streamer=streamer, **tiny.given(cache), **drafts)
    assert cache.get_seq_length() <= len(streamer.tokens)
    text = wanted[:, : max(ids.shape[1], cache.get_seq_length() + 1)]
    left = wanted.shape[1] - text.shape[1]
    mask = torch.ones_like(text)
    out = model.generate(text, attention_mask=mask, max_new_tokens=left, do_sample=False, **tiny.given(cache))
    assert torch.equal(out, wanted)


@DRAFTS
def test_guidance_is_refused(model, ids, drafts):
    with pytest.raises(ValueError, match="guidance_scale cannot be used with drafts"):
        generate(model, ids, guidance_scale=1.5, **drafts)
