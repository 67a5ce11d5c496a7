"""Prompt lookup of patched models drafts less where drafts are refused."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import GenerationMixin, PromptLookupCandidateGenerator

import hf_gdn
from hf_gdn.drafting.prompt_lookup import AdaptivePromptLookup
from tests import tiny_models as tiny


class Lookup:
    """Drafts zeros, always."""

    num_output_tokens, max_length = 10, 1000

    def get_candidates(self, ids):
        return torch.cat((ids, ids.new_zeros(1, self.num_output_tokens)), 1), None

    def update_candidate_strategy(self, ids, scores, matches):
        self.told = matches


def test_the_lookup_is_asked_for_as_many_as_pay_and_told_what_was_right():
    lookup, ids, found = AdaptivePromptLookup(Lookup()), torch.ones(1, 5, dtype=torch.long), []
    for _ in range(40):
        found.append(lookup.get_candidates(ids)[0].shape[1] - 5)
        lookup.update_candidate_strategy(ids, None, 0)
        assert lookup.lookup.told == 0
    assert found[0] > found[1] > 0 and found.count(0) > 20
    assert lookup.pace.drafted == sum(found)


def drafts(model):
    """The candidate generator that generate() makes."""
    config = GenerationConfig(prompt_lookup_num_tokens=7, max_length=20)
    config._eos_token_tensor = None
    return model._get_candidate_generator(config, None, None, [], {})


def test_of_patched_families_alone(family):
    model = tiny.model(family)
    assert type(drafts(model)) is PromptLookupCandidateGenerator
    other = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1))  # fmt: skip
    with hf_gdn.patched(family):
        found = drafts(model)
        assert type(found) is AdaptivePromptLookup and found.longest == 7
        assert type(drafts(other)) is PromptLookupCandidateGenerator
    assert type(drafts(model)) is PromptLookupCandidateGenerator
    assert type(model)._get_candidate_generator is GenerationMixin._get_candidate_generator


def test_fewer_forwards_where_drafts_are_refused(monkeypatch):
    """The tokens are those of plain decoding whatever is drafted."""
    model, read = tiny.model("qwen3_next"), []
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    ids = torch.tensor([[5, 6, 7, 8, 9] * 4])
    wrong = lambda self, ids, **_: (torch.cat((ids, torch.randint(1, 64, (1, self.num_output_tokens))), 1), None)  # noqa: E731
    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", wrong)
    with hf_gdn.patched(strict=True):
        given = dict(max_new_tokens=60, min_new_tokens=60, do_sample=False, pad_token_id=0)
        wanted = model.generate(ids, **given)
        read.clear()
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=10, **given), wanted)
    assert sum(read[1:]) < 1.5 * 60


@pytest.mark.parametrize("wrong", [0, -1])
def test_bad_lengths_are_still_refused(wrong):
    with hf_gdn.patched(), pytest.raises(ValueError, match="num_output_tokens"):
        tiny.model("qwen3_next").generate(torch.ones(1, 5, dtype=torch.long), prompt_lookup_num_tokens=wrong)
