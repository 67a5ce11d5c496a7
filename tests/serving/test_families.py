"""Continuous batching of every family: answers are those of `generate` for each prompt alone."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from transformers import GenerationConfig

import hf_gdn
from hf_gdn.errors import BatchingError
from hf_gdn.patches import batching
from hf_gdn.testing.tolerances import LOG_PROBABILITY
from tests import tiny_models as tiny
from tests.serving import runs

pytestmark = runs.needs_seams
LENGTHS = (1, 5, 70, 3, 33, 130, 2)


@pytest.mark.parametrize("backend", tiny.ON_A_CPU)
def test_answers_are_those_of_generate(family, backend):
    tiny.skip_what_it_cannot(family, batching.FEATURE)
    model, prompts = tiny.model(family), runs.prompts(LENGTHS)
    hf_gdn.patch(backend=backend)
    wanted = [runs.alone(model, prompt) for prompt in prompts]
    out = model.generate_batch(
        prompts, generation_config=runs.GREEDY, continuous_batching_config=runs.settings(return_logprobs=True)
    )
    assert [made.error for made in out.values()] == [None] * len(prompts)
    assert [made.generated_tokens for made in out.values()] == wanted
    for prompt, made in zip(prompts, out.values()):
        logits = model(torch.tensor([prompt + made.generated_tokens])).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(made.generated_tokens)[:, None])[:, 0]
        assert (torch.tensor(made.logprobs) - exact).abs().max() < LOG_PROBABILITY


def test_a_family_that_cannot_says_why(family):
    reason = dict(hf_gdn.patches.all_families()[family].cannot).get(batching.FEATURE)
    if reason is None:
        pytest.skip("it can")
    hf_gdn.patch()
    with pytest.raises(BatchingError, match=f"{family} has no continuous batching: {reason}"):
        tiny.model(family).generate_batch([[3, 4]], generation_config=runs.GREEDY)


def test_sampling_follows_the_distribution_of_the_logits():
    """2,000 first tokens, against the probabilities of a full forward: chi squared, at one in a million."""
    model, (prompt,) = tiny.model("qwen3_next", vocab_size=8), [[3, 4, 5, 6, 7]]
    hf_gdn.patch()
    sampled = GenerationConfig(max_new_tokens=1, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    count = 2000
    out = model.generate_batch(
        [prompt] * count,
        generation_config=sampled,
        continuous_batching_config=runs.settings(seed=5, num_blocks=256, max_batch_tokens=512),
    )
    with torch.no_grad():
        wanted = count * model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    found = torch.tensor([made.generated_tokens[0] for made in out.values()]).bincount(minlength=8)
    statistic = ((found - wanted) ** 2 / wanted).sum()
    assert statistic < 40.5  # quantile 1 - 1e-6 of chi squared with 7 degrees of freedom


def test_half_precision_serves():
    """Log-probabilities are those of the same weights in fp32.

    A logit passes some 100 roundings of 2^-9 on its way through the layers; independent ones make 2 % of its size.
    """
    model, prompts = tiny.model("qwen3_next", dtype=torch.bfloat16), runs.prompts((5, 40))
    exact = copy.deepcopy(model).float()
    hf_gdn.patch()
    out = model.generate_batch(
        prompts, generation_config=runs.GREEDY, continuous_batching_config=runs.settings(return_logprobs=True)
    )
    for prompt, made in zip(prompts, out.values()):
        assert made.error is None
        with torch.no_grad():
            logits = exact(torch.tensor([prompt + made.generated_tokens])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(made.generated_tokens)[:, None])[:, 0]
        assert (torch.tensor(made.logprobs) - wanted).abs().max() < 0.02 * logits.abs().max()


def test_layers_that_are_offloaded(caplog):
    """Kernels are chosen and checked for the device on which they run, not for meta."""
    model, (prompt,) = tiny.model("qwen3_next"), runs.prompts((20,))
    hf_gdn.patch()
    wanted = runs.alone(model, prompt)
    cpu_offload(model.model.layers, execution_device=torch.device("cpu"))
    out = model.generate_batch([prompt], generation_config=runs.GREEDY, continuous_batching_config=runs.settings())
    assert out["req_0"].generated_tokens == wanted
    assert "meta" not in caplog.text
