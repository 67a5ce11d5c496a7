"""The embedded models: small, trained, and with a recurrent state that matters."""

import importlib
import inspect

import pytest
import torch

from hf_gdn import patches
from hf_gdn.eval import forward_modes
from hf_gdn.loading import models, stdlib_text, texts

NAMES = models.embedded()
CHUNK_FUNCTION = {"qwen3_next": "torch_chunk_gated_delta_rule", "kimi_linear": "chunk_kimi_delta_attention"}
pytestmark = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def loaded(name):
    return models.load(models.Source(name), torch.device("cpu"), torch.float32)


def test_size_and_parts(name, loaded):
    assert len(NAMES) == 2
    assert (models.ASSETS / name / "model.safetensors").stat().st_size <= 4_000_000
    config = loaded.model.config
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    assert any("experts" in part for part, _ in loaded.model.named_modules())
    assert 900 <= config.vocab_size <= 1100
    text = "def f(x):\n\treturn 'é→'\n"
    assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids) == text


def cut(function):
    """A chunk function that forgets its state every 64 tokens."""

    def call(q, k, v, g, beta, **kwargs):
        options = {**kwargs, "initial_state": None}
        parts = zip(*(x.split(64, 1) for x in (q, k, v, g, beta)))
        results = [function(a, b, c, g=d, beta=e, **options) for a, b, c, d, e in parts]
        return torch.cat([o for o, _ in results], 1), results[-1][1]

    return call


def test_far_from_chance_and_worse_without_its_state(name, loaded, monkeypatch):
    ids = texts.windows(texts.tokenize(loaded.tokenizer, texts.embedded()), 512, None, 16).ids
    whole = forward_modes.perplexity(
        forward_modes.log_probs(forward_modes.prefill(loaded.model, ids[:, :-1]), ids[:, 1:])
    )
    assert whole < 14
    family = patches.all_families()[loaded.model.config.model_type]
    module = importlib.import_module(family.module)
    function = CHUNK_FUNCTION[family.name]
    monkeypatch.setattr(module, function, cut(inspect.unwrap(getattr(module, function))))
    forgetful = forward_modes.log_probs(forward_modes.prefill(loaded.model, ids[:, :-1]), ids[:, 1:])
    assert forward_modes.perplexity(forgetful) > 1.02 * whole


def test_held_out_modules_are_not_trained_on(name):
    trained = stdlib_text.stdlib_files()
    held_out = stdlib_text.held_out_text()
    assert len(trained) > 100 and len(held_out) > 300_000
    assert not any(path.read_text(errors="replace") in held_out for path in trained if path.stat().st_size > 2000)
