"""Attention of a batch on a CPU, request by request, against a softmax in float64 over what each query sees."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_gdn
from hf_gdn.patches.paged_attention import attend_to_own_keys
from hf_gdn.upstream import paged
from tests import tiny_models as tiny
from tests.serving import runs

# Requests as (new tokens, tokens in the cache before them).
BATCHES = {
    "answers": [(1, 0), (1, 7), (1, 40)],
    "prompts": [(5, 0), (1, 0), (33, 0)],
    "mixed": [(1, 12), (6, 0), (4, 9), (1, 3)],
    "padded": [(3, 2), (0, 0), (0, 0)],
}


def exact(query, key, value, requests, scale, window):
    """The same, one query at a time."""
    out, first, begin = torch.zeros(1, query.shape[2], query.shape[1], value.shape[3], dtype=torch.float64), 0, 0
    group = query.shape[1] // key.shape[1]
    for new, past in requests:
        for i in range(new):
            last = past + i + 1
            seen = slice(first + (0 if window is None else max(0, last - window)), first + last)
            for head in range(query.shape[1]):
                k, v = key[0, head // group, seen].double(), value[0, head // group, seen].double()
                weights = (scale * (k @ query[0, head, begin + i].double())).softmax(0)
                out[0, begin + i, head] = weights @ v
        begin, first = begin + new, first + new + past
    return out


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("batch", BATCHES)
def test_each_request_sees_its_own_keys(batch, heads, window):
    torch.manual_seed(0)
    requests = BATCHES[batch]
    if window is not None:  # the cache of a sliding window keeps the tokens before it only while they are seen
        requests = [(new, min(past, window - 1)) for new, past in requests]
    bounds = [torch.tensor([0, *row]).cumsum(0).int() for row in zip(*[(new, new + past) for new, past in requests])]
    padding = 2 if batch == "padded" else 0
    tokens, keys = int(bounds[0][-1]) + padding, int(bounds[1][-1]) + padding
    query, key = torch.randn(1, heads[0], tokens, 8), torch.randn(1, heads[1], keys, 8)
    value = torch.randn(1, heads[1], keys, 16)
    out = attend_to_own_keys(query, key, value, *bounds, 0.3, window)
    # Sums of at most 49 products of order one, in fp32.
    assert (out - exact(query, key, value, requests, 0.3, window)).abs().max() < 49 * 2**-23


@runs.needs_seams
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_only_sdpa_goes_without_a_mask(implementation):
    model, prompts = tiny.model("qwen3_next"), runs.prompts((20, 3, 40))
    model.set_attn_implementation(implementation)
    hf_gdn.patch()
    wanted = [runs.alone(model, prompt) for prompt in prompts]
    with runs.manager(model, max_batch_tokens=16, max_requests_per_batch=8) as made:
        ids = [made.add_request(prompt) for prompt in prompts]
        out = runs.results(made, ids)
        mask = made.batch_processor.inputs_and_outputs.attention_mask
    assert (mask is None) == (implementation == "sdpa")
    assert [out[name].generated_tokens for name in ids] == wanted


@runs.needs_seams
def test_sdpa_is_restored():
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    hf_gdn.patch()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__wrapped__ is original
    hf_gdn.unpatch()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original


@runs.needs_seams
def test_a_version_without_the_function_is_named(monkeypatch):
    monkeypatch.delitem(paged.attention_functions(), "sdpa")
    assert paged.missing().endswith("has no function 'sdpa'")
