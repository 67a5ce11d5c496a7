"""Private attributes of transformers' configs and auto classes."""

from __future__ import annotations

from typing import Any


def attention_implementation(config: Any) -> str:
    """The attention implementation that a model uses."""
    return config._attn_implementation


def commit(config: Any) -> str | None:
    """The hub revision that a config was loaded from; None if it was not loaded from the hub."""
    return getattr(config, "_commit_hash", None)


def compile_on_all_devices() -> Any:
    """A CompileConfig with which ``generate`` compiles on every device; by default it compiles on CUDA only."""
    from transformers import CompileConfig

    config: Any = CompileConfig()
    config._compile_all_devices = True
    return config


def has_causal_model(config: Any) -> bool:
    """Whether AutoModelForCausalLM has a class for a config."""
    from transformers import AutoModelForCausalLM

    return type(config) in AutoModelForCausalLM._model_mapping
