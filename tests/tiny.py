"""Tiny random models of every family, and how far tensors are apart."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, KimiLinearConfig, Qwen3NextConfig

_COMMON = dict(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
    layer_types=["linear_attention"] * 3 + ["full_attention"], moe_intermediate_size=16, num_experts=4,
    pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip

CONFIGS = {
    "qwen3_next": (
        Qwen3NextConfig,
        dict(
            _COMMON, num_key_value_heads=1, head_dim=16, linear_key_head_dim=8, linear_value_head_dim=16,
            linear_num_key_heads=2, linear_num_value_heads=4, shared_expert_intermediate_size=16, num_experts_per_tok=2,
        ),
    ),
    "kimi_linear": (
        KimiLinearConfig,
        dict(
            _COMMON, num_key_value_heads=2, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
            linear_head_dim=16, linear_num_heads=2, num_experts_per_token=2,
        ),
    ),
}  # fmt: skip
# Attribute path of a layer's recurrent mixer, and one of its input projections.
MIXER = {"qwen3_next": "linear_attn", "kimi_linear": "self_attn"}
PROJECTIONS = {"qwen3_next": ["in_proj_qkvz", "out_proj"], "kimi_linear": ["q_proj", "v_proj", "o_proj"]}


def config(family: str, **changes):
    cls, values = CONFIGS[family]
    return cls(**{**values, **changes})


def model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A model with random weights, the same for the same arguments."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(family, **changes), dtype=dtype).eval()


def mixer(model, index: int = 0):
    return getattr(model.model.layers[index], MIXER[model.config.model_type])


def batch(rows: int = 3, length: int = 70, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a left-padded mask of unequal lengths, the last row shorter than a convolution's window."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, length), generator=random)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : length - (2 if row == rows - 1 else length // (row + 1))] = 0
    return ids.masked_fill(mask == 0, 0), mask


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius error; infinite when `got` is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    norm = wanted.double().norm().item()
    return (got.double() - wanted.double()).norm().item() / norm if norm else got.double().norm().item()


def assert_close(name: str, got: torch.Tensor, wanted: torch.Tensor, budget: float) -> None:
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    found = error(got, wanted)
    assert found <= budget, f"{name}: error {found:.2e}, budget {budget:.1e}"
