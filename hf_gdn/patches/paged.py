"""Run a patched layer on a batch of continuous batching: packed sequences whose states are in slots of a pool.

Every sequence is one request: some tokens of a prompt, or the next token of an answer. One call serves all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..kernels.contract import Projections, Slots
from ..operators import call_delta_rule, call_norm, call_prologue, call_step
from ..upstream import paged
from .mixer import LayerCall

# Keyword argument with which a text model's forward passes a `PackedBatch` to its layers.
ARGUMENT = "hf_gdn_batch"


def with_batch(cache: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a text model's forward, with the batch for its layers. Where there is no mask, none is made."""
    x = given.get("inputs_embeds")
    x = given["input_ids"] if x is None else x
    masks = given.get("attention_mask")
    masks = dict.fromkeys(cache.cache_allocators) if masks is None else masks
    return {**given, "attention_mask": masks, ARGUMENT: paged.batch_of(cache, given, x.shape[1])}


def _rows_of_one_token(projected: Projections) -> Projections:
    """Outputs for one row of tokens ``[1, T, ...]`` as rows of one token, ``[T, 1, ...]``."""
    return Projections(*(x if x is None else x.transpose(0, 1) for x in projected))  # type: ignore[arg-type]


@torch.compiler.disable  # the pools are views of one tensor of bytes, and updated in place
def run_paged(call: LayerCall, cache: Any, x: Tensor, batch: paged.PackedBatch) -> Tensor:
    """Run the whole layer on x ``[1, T, hidden]``, and update the slots of the batch's sequences."""
    projected = call.project(x)
    plan, weights = call.prepare(projected)
    conv_states, states = paged.pools(cache, call.layer.layer_idx)
    slots = Slots(batch.slots, batch.begun)
    if batch.single and plan.step is not None:
        rows = _rows_of_one_token(projected)
        y = call_step(plan.step, rows, weights, plan.spec, conv_states, states, plan.asked, slots)
        return call.output(y.transpose(0, 1).flatten(2))
    kernel, prologue, norm = plan.route(batch.longest)
    if not prologue.slots:
        prologue = registry.get(prologue.op, "eager")
    *inputs, _ = call_prologue(
        prologue,
        projected,
        weights,
        plan.spec,
        conv_state=conv_states,
        keep=conv_states.shape[2],
        cu_seqlens=batch.cu_seqlens,
        lengths=None,
        asked=plan.asked,
        slots=slots,
    )
    o, _ = call_delta_rule(
        kernel,
        *inputs,
        scale=plan.dims.head_k_dim**-0.5,
        initial_state=states,
        cu_seqlens=batch.cu_seqlens,
        qk_l2norm=False,
        beta_max=plan.spec.beta_scale,
        asked=plan.asked,
        slots=slots,
    )
    if norm is None or weights.norm is None:
        module, z = getattr(call.layer, call.family.norm_name), projected.z.reshape(o.shape)
        mixed = module(o.flatten(0, -2), z.flatten(0, -2)).view(1, x.shape[1], -1)
    else:
        mixed = call_norm(norm, o, projected.z, weights.norm, plan.spec, plan.asked).flatten(2)
    return call.output(mixed)
