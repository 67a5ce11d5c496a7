"""The multi-token-prediction head of Qwen3-Next's and Qwen3.5's checkpoints.

With h_t the model's hidden state of token t after its final norm, and x_{t+1} the next token, it predicts x_{t+2}:

    u = fc(cat(norm_e(embed(x_{t+1})), norm_h(h_t)))        the embedding first
    d = norm(layer(u))                                      a full-attention decoder layer with a cache of its own
    logits = lm_head(d)                                     the model's own

and x_{t+3} from d in place of h_{t+1}, and so on. vLLM feeds the model's output, which is after the final norm
(vllm/model_executor/models/qwen3_next_mtp.py), and so does SGLang (python/sglang/srt/models/qwen3_next_mtp.py); some
ports take the hidden state before the norm, which predicts worse (tests/drafting/test_mtp.py): a little where the final
norm's weights are nearly equal, for `norm_h` undoes the rest. The weights are in transformers' `MtpLayer`, where they
have other names.
"""

from __future__ import annotations

import re
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..upstream import modules, mtp
from .mtp_layer import HeadCache, Rotary, run

# A checkpoint's names -> transformers'. The rest of ``mtp.layers.0.`` is a decoder layer, named as in the model.
_RENAMED = {
    "mtp.fc.": "eh_proj.",
    "mtp.pre_fc_norm_embedding.": "enorm.",
    "mtp.pre_fc_norm_hidden.": "hnorm.",
    "mtp.norm.": "post_norm.",
    "mtp.layers.0.": "mtp_block.",
}
_EXPERT = re.compile(r"^mtp\.layers\.0\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight$")
_SCALE = re.compile(r"_scale(_inv)?$")  # of a weight in fp8

_heads: WeakKeyDictionary[nn.Module, MtpHead] = WeakKeyDictionary()


class MtpHead:
    """A head: the layer, and how it reads.

    Args:
        layer: transformers' `MtpLayer`, with weights.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer.eval()

    def read(self, embeds: Tensor, hidden: Tensor, rotary: Rotary, cache: HeadCache | None) -> Tensor:
        """Read tokens behind those that the cache holds.

        Args:
            embeds: of x_{t+1} ``[1, T, hidden]``.
            hidden: h_t ``[1, T, hidden]``.
            rotary: of the positions of h_t.
            cache: grows by T; None to read without what was before.

        Returns:
            d ``[1, T, hidden]``.
        """
        return run(self.layer, embeds.to(hidden.device), hidden, rotary, cache)


class NoHead(ValueError):
    """The checkpoint has no multi-token-prediction head."""


@torch.inference_mode(False)  # in which loaded weights could not be moved later
@torch.no_grad()
def head_of(model: Any) -> MtpHead:
    """The head that ships with a model's checkpoint, loaded once per model, on its last layer's device.

    Raises:
        NoHead: the checkpoint has none.
        ValueError: the checkpoint cannot be read again, or the head's tensors are missing, quantized, or have other
            shapes.
    """
    device = modules.runs_on(model.get_decoder().layers[-1])
    head = _heads.get(model)
    if head is None:
        head = _heads[model] = _load(model, device)
    weight = next(head.layer.parameters())
    if (weight.device, weight.dtype) != (device, model.dtype):
        head.layer.to(device, model.dtype)
    return head


def _load(model: Any, device: torch.device | None) -> MtpHead:
    where = model.config.name_or_path or "a model made from a config"
    try:
        tensors = mtp.checkpoint_tensors(model)
    except OSError as error:
        raise ValueError(f"use_mtp=True reads the head from the model's checkpoint, {where!r}: {error}") from error
    if not tensors:
        raise NoHead(
            f"use_mtp=True needs a checkpoint with tensors mtp.*, the multi-token-prediction head; {where!r} has none"
        )
    scales = [name for name in tensors if _SCALE.search(name)]
    if scales:
        raise ValueError(
            f"the multi-token-prediction head of {where!r} is quantized, which is not supported: {scales[0]}"
        )
    config = mtp.head_config(model.config, experts=any(".mlp.experts." in name for name in tensors))
    layer = mtp.make_layer(model, config)
    weights = renamed(tensors)
    wanted = layer.state_dict()
    problems = [f"{_shown(name)} is missing" for name in wanted if name not in weights]
    problems += [
        f"{_shown(name)} is {list(weights[name].shape)}, expected {list(value.shape)}"
        for name, value in wanted.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems += [f"{_shown(name)} is not of such a head" for name in weights if name not in wanted]
    if problems:
        raise ValueError(f"the multi-token-prediction head of {where!r} cannot be loaded: {'; '.join(problems)}")
    layer.load_state_dict({name: value.to(device, model.dtype) for name, value in weights.items()}, assign=True)
    return MtpHead(layer.requires_grad_(False))


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors by the names of `MtpLayer`; those of single experts joined to one of all."""
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, value in tensors.items():
        match = _EXPERT.match(name)
        if match is not None:
            experts.setdefault(match[2], {})[int(match[1])] = value
            continue
        for theirs, ours in _RENAMED.items():
            if name.startswith(theirs):
                found[ours + name.removeprefix(theirs)] = value
                break
        else:
            found[name] = value
    if experts:
        gate, up, down = (_stacked(experts.get(kind, {})) for kind in ("gate", "up", "down"))
        if gate.shape == up.shape:
            found["mtp_block.mlp.experts.gate_up_proj"] = torch.cat((gate, up), 1)
        found["mtp_block.mlp.experts.down_proj"] = down
    return found


def in_checkpoint_names(head: MtpHead) -> dict[str, Tensor]:
    """A head's weights as checkpoints have them: ``mtp.*``, one tensor per expert."""
    found: dict[str, Tensor] = {}
    for name, value in head.layer.state_dict().items():
        kind = name.removeprefix("mtp_block.mlp.experts.")
        if kind == "gate_up_proj":
            parts = {"gate": value.chunk(2, 1)[0], "up": value.chunk(2, 1)[1]}
        else:
            parts = {"down": value} if kind == "down_proj" else {}
        for part, experts in parts.items():
            found |= {f"mtp.layers.0.mlp.experts.{i}.{part}_proj.weight": expert for i, expert in enumerate(experts)}
        if not parts:
            found[_shown(name)] = value
    return found


def _stacked(parts: dict[int, Tensor]) -> Tensor:
    """Experts ``[E, rows, columns]``; nothing where one is missing or they differ."""
    order = [parts[number] for number in sorted(parts)]
    whole = sorted(parts) == list(range(len(parts))) and len({part.shape for part in order}) == 1
    return torch.stack(order) if whole else torch.empty(0)


def _shown(name: str) -> str:
    """A name of `MtpLayer` as the checkpoint has it."""
    for theirs, ours in _RENAMED.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
