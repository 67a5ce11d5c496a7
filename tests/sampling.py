"""Are tokens that a model samples those of its own distribution?"""

from __future__ import annotations

import pytest
import torch

VOCABULARY, DRAWS = 5, 200
PROMPT = torch.tensor([[0, 1, 2, 3, 4] * 4])


def sharpened(model):
    """The model, of `VOCABULARY` tokens and none that ends a text, with logits far enough apart to tell distributions
    from each other."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    return model


def exact_pairs(model) -> torch.Tensor:
    """Probabilities ``[VOCABULARY, VOCABULARY]`` of the two tokens after `PROMPT`."""
    pairs = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    with torch.no_grad():
        logits = model(torch.cat((PROMPT.expand(len(pairs), -1), pairs), 1), use_cache=False).logits.double()
    first, second = logits[:, -3].log_softmax(-1), logits[:, -2].log_softmax(-1)
    exact = (first.gather(1, pairs[:, :1]) + second.gather(1, pairs[:, 1:])).exp().view(VOCABULARY, VOCABULARY)
    assert exact.sum().item() == pytest.approx(1, abs=1e-6) and exact.max() > 4 * exact.min()
    return exact


def assert_sampled_from(exact: torch.Tensor, model, new_tokens: int = 2, **drafts) -> None:
    """Pairs that ``generate`` samples are of a distribution. chi^2 with 24 degrees of freedom is above 60 once in
    10,000 times; seeds are fixed."""
    counts, at = torch.zeros_like(exact), PROMPT.shape[1]
    mask = torch.ones_like(PROMPT)  # or generate() takes token 0 for padding
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        out = model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=new_tokens, attention_mask=mask, **drafts)
        counts[tuple(out[0, at : at + 2])] += 1
    chi2 = ((counts - DRAWS * exact).square() / (DRAWS * exact)).sum().item()
    assert chi2 < 60, f"chi^2 {chi2:.1f}"
