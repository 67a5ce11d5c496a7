"""Tiny random models of every family."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_gdn import patches
from hf_gdn.patches.families.base import FEATURES
from hf_gdn.upstream.cache_names import as_argument as given  # keyword arguments that pass a cache to a model
from hf_gdn.upstream.cache_names import as_layer_argument as layer_given
from hf_gdn.upstream.cache_names import of_outputs as cache_of

__all__ = ["cache_of", "given", "layer_given"]
IMAGE = 120  # the token id that stands for a part of an image (`with_vision`)
ABSENT = object()  # in a config's values: leave the field out
# Backends that serve inference on this machine's CPU, in the order in which "auto" tries them.
ON_A_CPU = ("numba", "eager") if importlib.util.find_spec("numba") else ("eager",)
# Ops with the delta rule's own signature; step ops are all of a layer between its projections.
DELTA_RULES = ("chunk_gdn", "recurrent_gdn", "chunk_kda", "recurrent_kda")
_COMMON = dict(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
    layer_types=["linear_attention"] * 3 + ["full_attention"], moe_intermediate_size=16,
    pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
_GDN = dict(
    num_key_value_heads=1, head_dim=16, linear_key_head_dim=8, linear_value_head_dim=16, linear_num_key_heads=2,
    linear_num_value_heads=4,
)  # fmt: skip
_QWEN_MOE = dict(_GDN, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=16)
_KDA = dict(
    num_key_value_heads=2, kv_lora_rank=16, qk_nope_head_dim=16, v_head_dim=16, linear_head_dim=16, linear_num_heads=2,
)  # fmt: skip

# Family -> name of the text model's config class, and its values where they differ from those common to all.
# Left out of most tests without --all: their layers, caches and masks are those of the families named here.
EXTENDED = {
    "qwen3_5_moe": "qwen3_5",
    "lara_mini": "qwen3_5",
    "bailing_hybrid": "kimi_linear",
    "qwen4_exp": "glm5_next",
}
ALL = {
    "qwen3_next": ("Qwen3NextConfig", _QWEN_MOE),
    "qwen3_5": ("Qwen3_5TextConfig", _GDN),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", _QWEN_MOE),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        dict(
            _QWEN_MOE, output_gate_type="sigmoid", hc_count=2, hc_lowrank=8, indexer_n_heads=2, indexer_kv_heads=1,
            indexer_head_dim=16, indexer_budget=64, indexer_compress_ratio=4, ple_layer_ids=[1], ple_embed_dim=32,
            heads_per_ngram=2, ngram_vocab_size_base=64, make_ngram_vocab_size_divisible_by=8, split_ngram_parts=1,
        ),
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        dict(_GDN, num_key_value_heads=2, linear_key_head_dim=12, linear_value_head_dim=24),
    ),
    "kimi_linear": ("KimiLinearConfig", dict(_KDA, qk_rope_head_dim=8, num_experts=4, num_experts_per_token=2)),
    "glm5_next": (
        "Glm5NextTextConfig",
        dict(
            _KDA, q_lora_rank=16, qk_rope_head_dim=0, n_routed_experts=4, num_experts_per_tok=2, index_topk=64,
            index_head_dim=16, index_n_heads=2, index_kpool=4, hc_mult=2,
            layer_types=None, mlp_layer_types=["dense"] + ["sparse"] * 3,
        ),
    ),
    "lara_mini": (
        "LaraMiniConfig",
        dict(
            _QWEN_MOE, intermediate_size=ABSENT, sliding_window=16, num_hidden_layers=5,
            layer_types=["linear_attention"] * 3 + ["sliding_attention", "full_attention"],
        ),
    ),
    "bailing_hybrid": (
        "BailingHybridConfig",
        dict(
            _KDA, qk_rope_head_dim=8, head_dim=16, num_local_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            first_k_dense_replace=1, num_mtp_layers=0,
        ),
    ),
}  # fmt: skip
# Those that the installed transformers has.
CONFIGS = {
    name: (getattr(transformers, cls), {**_COMMON, **values})
    for name, (cls, values) in ALL.items()
    if hasattr(transformers, cls)
}


def mainly(*names: str):
    """Mark of a test that takes these families, and with --all every other one."""
    families = [pytest.param(name, marks=() if name in names else pytest.mark.extended) for name in sorted(ALL)]
    return pytest.mark.parametrize("family", families, indirect=True)


def config(family: str, **changes):
    cls, values = CONFIGS[family]
    return cls(**{name: value for name, value in {**values, **changes}.items() if value is not ABSENT})


def model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A model with random weights, the same for the same arguments."""
    torch.manual_seed(seed)
    text = config(family, **changes)
    if family == "glm5_next":  # has no text-only model with a head
        vision = dict(hidden_size=16, depth=1, num_heads=2, intermediate_size=16, out_hidden_size=32)
        whole = transformers.Glm5NextConfig(text_config=text.to_dict(), vision_config=vision)
        built = transformers.Glm5NextForConditionalGeneration._from_config(whole, dtype=dtype)
    else:
        built = AutoModelForCausalLM.from_config(text, dtype=dtype)
    return built.eval()


def _enlarged(built: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if weight.dim() > 1 and "conv" not in name:
                weight.mul_(6)
    return built


def lively(family: str, seed: int = 0) -> torch.nn.Module:
    """A model with larger weights, whose greedy tokens differ from step to step; those of `model` soon repeat."""
    return _enlarged(model(family, seed))


def skip_what_it_cannot(family: str, feature: str) -> None:
    """Skip a test of a feature that a family does not have, with or without hf_gdn."""
    assert feature in FEATURES
    reason = dict(patches.all_families()[family].cannot).get(feature)
    if reason is not None:
        pytest.skip(reason)


def mixers(model) -> list:
    """The recurrent mixers of a model, layer by layer."""
    names = {family.class_name for family in patches.all_families().values()}
    return [module for module in model.modules() if type(module).__name__ in names]


def mixer(model, index: int = 0):
    return mixers(model)[index]


def projections(model) -> list[str]:
    """Names of some Linear modules of a mixer: the first input projection and the output projection."""
    names = [name for name, part in mixer(model).named_children() if isinstance(part, torch.nn.Linear)]
    last = next(name for name in names if name in ("out_proj", "o_proj"))
    return [next(name for name in names if name != last), last]


def batch(rows: int = 3, length: int = 70, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a left-padded mask of unequal lengths, the last row shorter than a convolution's window."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, length), generator=random)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : length - (2 if row == rows - 1 else length // (row + 1))] = 0
    return ids.masked_fill(mask == 0, 0), mask


def with_vision(family: str, seed: int = 0) -> torch.nn.Module:
    """A model of a family that also reads images of 16 patches as four `IMAGE` tokens, with larger weights."""
    cls = {"qwen3_5": "Qwen3_5Config", "qwen3_5_moe": "Qwen3_5MoeConfig", "qwen4_exp": "Qwen4ExpConfig"}[family]
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=4,
        spatial_merge_size=2, temporal_patch_size=2, in_channels=3, num_position_embeddings=16,
    )  # fmt: skip
    tokens = dict(image_token_id=IMAGE, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123)
    whole = getattr(transformers, cls)(text_config=config(family).to_dict(), vision_config=vision, **tokens)
    torch.manual_seed(seed)
    built = transformers.AutoModelForImageTextToText.from_config(whole, dtype=torch.float32)
    return _enlarged(built.eval())


def with_image(before: list[int], after: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt of `with_vision`: tokens, an image, tokens."""
    ids = torch.tensor([[*before, 122, *[IMAGE] * 4, 123, *after]])
    pixels = torch.randn(16, 96, generator=torch.Generator().manual_seed(seed))
    types = (ids == IMAGE).int()
    return dict(input_ids=ids, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]]), mm_token_type_ids=types)
