"""Checkpoints with multi-token-prediction heads of random weights, in the layout of the real ones."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hf_gdn.drafting.mtp_head import MtpHead, in_checkpoint_names
from hf_gdn.upstream import mtp


def random_head(model, seed: int = 5) -> MtpHead:
    """A head for a model, all of its weights at random."""
    experts = bool(getattr(model.config.get_text_config(), "num_experts", 0))
    config = mtp.head_config(model.config, experts=experts)
    layer = mtp.make_layer(model, config).to_empty(device="cpu").to(model.dtype)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            scale = 0.1 if p.ndim == 1 else 2 * p.shape[-1] ** -0.5
            p.copy_(scale * torch.randn(p.shape, generator=random))
    return MtpHead(layer)


def save(model, folder, *, shards: int = 1, change=dict) -> None:
    """Save a model and a random head of it.

    Args:
        model: the model.
        folder: where to.
        shards: files that the weights are divided among, with an index if there are several.
        change: called with the head's tensors by name; returns those to save.
    """
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    head = {name: value.contiguous().clone() for name, value in in_checkpoint_names(random_head(model)).items()}
    tensors |= change(head)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder, *, vision: bool = False, **options):
    """A model from a folder, in evaluation mode."""
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    return auto.from_pretrained(folder, **options).eval()
