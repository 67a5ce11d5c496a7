"""Attention sinks: a cache for hybrid models that processes any number of tokens in constant memory.

Full-attention layers keep the first `sink_tokens` and the last `window` tokens (StreamingLLM, Xiao et al. 2023). Linear
layers keep their states, whose size is constant. The buffers are allocated once and used as ring buffers.
`hf_gdn.patch()` must be in force: the text model's patched forward passes the cache what ``update`` of a layer does not
receive (which tokens are padding, and the rotary frequencies), and takes positions and masks from the cache.

**Positions.** Attention must see the distance between a query and a key *inside the cache*. transformers caches keys
after rotation, and rotary scores depend on differences of positions only. Differences within the window are already
correct. Sinks are rotated forward with the query, from the original key, in fp32 (`plan`). This stays exact because:

- Positions do not grow with the stream. The angle of position p is p times a frequency, rounded in fp32: at p = 10^6 it
  is off by 0.03 rad, from 2^24 on positions are not exact integers, and models would see positions they were never
  trained on. So positions are reduced by a power of two (`Sizes.era`, at least C) when they exceed C by that much, and
  the window's keys are rotated back by as much, once for each key. In a piece of T tokens, positions stay below
  C + era + T.
- The rotary type must be relative: any frequencies and scale, but the same at all positions. ``dynamic`` and
  ``longrope`` are refused, because their frequencies depend on the length, so cached keys would not match later ones.

``default``, ``linear``, ``llama3``, ``yarn`` and ``proportional`` are relative; cached keys keep their scale. Models
without rotary keys (Kimi-Linear, OLMo-Hybrid as released) need none of this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from ...upstream.configs import attention_implementation
from ...upstream.tensors import mark_static_address
from .masks import as_mask, check_implementation, real_columns
from .plan import MultiTokenPlan, SingleTokenPlan, Sizes, plan_piece, plan_step, turned

__all__ = ["SinkCache", "SinkLayer"]

# Model types whose full attention reads only keys (or latents) and values.
SUPPORTED = ("bailing_hybrid", "kimi_linear", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next")
_REFUSED = {
    "glm5_next": "its indexer reads all tokens",
    "lara_mini": "its sliding-window layers do not keep the first tokens",
    "qwen4_exp": "its indexer reads all tokens",
}
_NOT_RELATIVE = ("dynamic", "longrope")


class SinkLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer: two buffers ``[B, H, sinks + window, D]``, and the original sinks.

    With latent attention (MLA), "keys" and "values" are the two latents, stored and evicted together.
    """

    is_compileable = True
    is_sliding = False
    is_croppable = True  # `SinkCache.crop` says when it is not
    supports_early_init = False

    def __init__(self, cache: SinkCache) -> None:
        super().__init__()
        self.cache = cache
        self.rotary_values = cache.latent  # latent attention stores its rotary part in the values
        self.sinks: Tensor | None = None  # [B, H, sinks, rotary dimensions], as received

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, filled with zeros."""
        sizes, inv_freq = self.cache.sizes, self.cache.inv_freq
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        for name, new in (("keys", key_states), ("values", value_states)):
            setattr(self, name, new.new_zeros((*new.shape[:2], sizes.slots, new.shape[3])))
        if inv_freq is not None:
            rotary = value_states if self.rotary_values else key_states
            self.sinks = rotary.new_zeros((*rotary.shape[:2], sizes.sinks, 2 * len(inv_freq)))
        if not torch.compiler.is_compiling():
            for buffer in self.buffers():
                mark_static_address(buffer)
        self.is_initialized = True

    def buffers(self) -> list[Tensor]:
        """All buffers of the layer."""
        return [x for x in (self.keys, self.values, self.sinks) if x is not None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a forward and return those that its queries read."""
        if self.cache.plan is None:
            raise RuntimeError(
                "a SinkCache needs a model that hf_gdn has patched: call hf_gdn.patch() first; "
                f"model types: {', '.join(SUPPORTED)}"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.cache.plan.apply(self, key_states, value_states)

    def set_back(self, positions: Tensor, inv_freq: Tensor) -> None:
        """Rotate the window's keys back by positions ``[B]``."""
        if not self.is_initialized:
            return
        held: Any = self.values if self.rotary_values else self.keys
        angle = -positions.to(held.device)[:, None, None, None].float() * inv_freq.to(held.device)
        window = held[:, :, self.cache.sizes.sinks :, : 2 * len(inv_freq)]
        window.copy_(turned(window, angle))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys that a forward reads, and offset 0. The mask itself comes from `SinkCache.begin`."""
        held = min(int(self.get_seq_length()), self.cache.sizes.slots)
        return (self.cache.sizes.slots if query_length == 1 else held + query_length), 0

    def get_seq_length(self) -> int:
        return self.cache.seen()

    def get_max_length(self) -> int:
        return -1  # unlimited

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def rows(self, index: Tensor) -> None:
        """Gather the rows `index`; in place if their number does not change."""
        if not self.is_initialized:
            return
        for name in ("keys", "values", "sinks"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, _rows(held, index, 0))
                self.batch_size = len(getattr(self, name))

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: slots behind the counters, which `SinkCache.crop` moves back, are not read."""


def _rows(held: Tensor, index: Tensor, dim: int) -> Tensor:
    chosen = held[(slice(None),) * dim + (index.to(held.device),)]
    return held.copy_(chosen) if chosen.shape == held.shape else chosen


def _new_layers(cache: SinkCache, full_attention: list[bool]) -> list[Any]:
    return [SinkLayer(cache) if full else LinearAttentionLayer() for full in full_attention]


class SinkCache(Cache):
    """A cache of constant size for hybrid models: attention sinks, a window, and the states of linear layers.

        hf_gdn.patch()
        cache = SinkCache(model.config, sink_tokens=4, window=4092)
        model.generate(**inputs, cache=cache, prefill_chunk_size=1024)

    Every token reads the first `sink_tokens` tokens and the last `window` tokens, including itself, however the tokens
    are divided among forwards. In a model with rotary keys, a piece of T tokens reads window + T (1 + sinks) keys once
    tokens are evicted, so the caller should process long prompts in pieces, with ``prefill_chunk_size`` or in a loop.
    Padding may be anywhere and is not stored. Decoding one token uses buffers of fixed address and shape, also under
    ``torch.compile(fullgraph=True)``. ``copy.deepcopy`` makes an independent copy, to branch from or to return to.
    Inference only: call the model under ``torch.no_grad()``.

    Args:
        config: the model's config.
        sink_tokens: number of first tokens that are kept forever.
        window: number of last tokens that are kept.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is too small, or the model type or rotary type is not supported.

    Examples:
        >>> from hf_gdn.caches import SinkCache
        >>> cache = SinkCache(model.config, sink_tokens=2, window=6)
        >>> with hf_gdn.patched():
        ...     out = model.generate(**inputs, cache=cache, max_new_tokens=30)
        >>> int(cache.seen()), cache.layers[3].keys.shape[2]
        (37, 8)
    """

    least_sinks = 1  # `hf_gdn.eval.long_stream` overrides it, to compare with a window without sinks
    plans_forwards = True  # the text model's patched forward calls `begin` and `commit`

    def __init__(self, config: Any, sink_tokens: int = 4, window: int = 4092) -> None:
        for name, value, least in (("sink_tokens", sink_tokens, self.least_sinks), ("window", window, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        text = config.get_text_config(decoder=True)
        family = text.model_type.removesuffix("_text")
        if family not in SUPPORTED:
            why = f": {_REFUSED[family]}" if family in _REFUSED else ""
            raise ValueError(f"no attention sinks for model type {family!r}{why}; supported: {', '.join(SUPPORTED)}")
        rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope in _NOT_RELATIVE and family != "kimi_linear":  # Kimi-Linear does not use its rotary parameters
            raise ValueError(
                f"no attention sinks with rotary type {rope!r}: its frequencies depend on the length, "
                "so keys in the cache do not match later ones"
            )
        self.sizes = Sizes(sink_tokens, window)
        self.latent = getattr(text, "kv_lora_rank", None) is not None
        self.inv_freq: Tensor | None = None  # [F], the model's own tensor, set by the first forward
        self.plan: SingleTokenPlan | MultiTokenPlan | None = None  # plan of the current forward
        self._counts: Tensor | None = None  # [3, B]: columns read, tokens read (without padding), base of positions
        self._taken: tuple[int, Tensor | int] = (0, 0)  # columns and tokens of the current forward
        super().__init__(layers=_new_layers(self, [kind != "linear_attention" for kind in text.layer_types]))

    # ----------------------------------------------------------------------------------------------- around a forward

    def begin(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Plan a forward of the text model. All argument errors are raised here, before any change.

        Args:
            model: the text model.
            given: the arguments of its forward by name.

        Returns:
            The arguments that the cache determines: ``attention_mask`` and ``position_ids``.
        """
        ids = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if ids is None:
            raise ValueError("the model was given neither input_ids nor inputs_embeds")
        hosted = not (torch.compiler.is_compiling() or (ids.is_cuda and torch.cuda.is_current_stream_capturing()))
        self._check(given, ids, hosted)
        batch, length = ids.shape[:2]
        real = real_columns(
            given.get("attention_mask"), batch, length, int(self.seen()) if hosted else None, ids.device
        )
        if real is not None and hosted and bool(real.all()):
            real = None
        kind = attention_implementation(model.config)
        check_implementation(kind)
        rotary = getattr(model, "rotary_emb", None)
        self.inv_freq = None if rotary is None else rotary.inv_freq
        counts = self._begun(batch, ids.device)
        self._set_back(counts, hosted)
        n, base = counts[1], counts[2]
        seen: Tensor | None
        if length == 1:
            self.plan, seen = plan_step(self.sizes, n, base, self.inv_freq, n.tolist() if hosted else None)
            token, plain = n[:, None], False
        else:
            tokens = torch.ones(batch, length, dtype=torch.bool, device=ids.device) if real is None else real
            self.plan, seen, token = plan_piece(self.sizes, n, base, self.inv_freq, n.tolist(), tokens)
            plain = self.plan.alone
        dtype = model.embed_tokens.weight.dtype if given.get("inputs_embeds") is None else ids.dtype
        self._taken = length, length if real is None else real.sum(1)
        return {
            "attention_mask": {
                "full_attention": as_mask(seen, real, plain, kind, dtype),
                "linear_attention": real if length > 1 or hosted else None,
            },
            "position_ids": (token - base[:, None]).clamp(min=0),
        }

    def commit(self) -> None:
        """Finish the forward that `begin` planned: advance the counters."""
        columns, tokens = self._taken
        if self._counts is not None:
            self._counts[0] += columns
            self._counts[1] += tokens
        self.plan = None

    def _check(self, given: dict[str, Any], ids: Tensor, hosted: bool) -> None:
        """Raise ValueError for inputs that the cache cannot process. `hosted`: tensor values can be read."""
        if torch.is_grad_enabled():
            raise ValueError("a SinkCache is for inference: call the model under torch.no_grad()")
        for name in ("seq_idx", "cu_seq_lens_q"):
            if given.get(name) is not None:
                raise ValueError(f"a SinkCache takes one sequence per row, not packed sequences; got {name}")
        positions = given.get("position_ids")
        spread = None if positions is None or positions.ndim != 3 or not hosted else positions[-3:] != positions[-1:]
        if spread is not None and bool(spread.any()):  # height and width positions differ from those of time
            raise ValueError("a SinkCache takes text only; got position_ids of images")
        if self._counts is not None and self._counts.shape[1] != len(ids) and (not hosted or self.seen() > 0):
            raise ValueError(f"the SinkCache holds {self._counts.shape[1]} rows, the model was given {len(ids)}")

    def _begun(self, batch: int, device: torch.device) -> Tensor:
        """The counters. If the number of rows has changed, make new counters and new layers."""
        counts = self._counts
        if counts is None or counts.shape[1] != batch:
            counts = self._counts = torch.zeros(3, batch, dtype=torch.long, device=device)
            if not torch.compiler.is_compiling():
                mark_static_address(counts)
            recording = any(getattr(layer, "record_past", False) for layer in self.layers)
            self.layers = _new_layers(self, [isinstance(layer, SinkLayer) for layer in self.layers])
            if recording:
                self.activate_past_recording()
        return counts

    def _set_back(self, counts: Tensor, hosted: bool) -> None:
        """Reduce the positions of rows that exceed C by an era or more."""
        base = self.sizes.base(counts[1])
        if self.inv_freq is None or (hosted and torch.equal(base, counts[2])):
            return
        for layer in self.layers:
            if isinstance(layer, SinkLayer):
                layer.set_back(base - counts[2], self.inv_freq)
        counts[2] = base

    # ----------------------------------------------------------------------------------------------- transformers' side

    def seen(self) -> Any:
        """Columns read so far, including padding: an int, or a tensor under torch.compile or CUDA-graph capture."""
        if self._counts is None:
            return 0
        seen = self._counts[0, 0]
        capturing = seen.is_cuda and torch.cuda.is_current_stream_capturing()
        return seen if torch.compiler.is_compiling() or capturing else int(seen)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of all layers."""
        return sum(sum(x.nbytes for x in _tensors(layer)) for layer in self.layers)

    def reset(self) -> None:
        """Empty the cache; the buffers keep their addresses."""
        super().reset()
        self.plan = None
        if self._counts is not None:
            self._counts.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row ``beam_idx[i]``."""
        self._rows(beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows selected by indices or a boolean mask."""
        rows = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        self._rows(rows, lambda layer: layer.batch_select_indices(rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; copies are adjacent."""
        if self._counts is not None:
            rows = torch.arange(self._counts.shape[1], device=self._counts.device).repeat_interleave(repeats)
            self._rows(rows, lambda layer: layer.batch_repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back the last `-tokens_to_remove` tokens, as long as no token has been evicted.

        Raises:
            RuntimeError: tokens have been evicted, rows have padding, or linear layers have not recorded so many
                tokens (``activate_past_recording``). Nothing is changed.
        """
        if tokens_to_remove != 0 and self._counts is not None:
            self._check_crop(*(row.tolist() for row in self._counts[:2]))
        super().crop(tokens_to_remove)
        if self._counts is not None:
            self._counts[:2] += tokens_to_remove

    def _check_crop(self, columns: list[int], tokens: list[int]) -> None:
        slots = self.sizes.slots
        if max(tokens) > slots:
            raise RuntimeError(
                f"a SinkCache that has evicted tokens cannot be cropped: it was given {max(tokens)} and keeps {slots}"
            )
        if columns != tokens:
            raise RuntimeError(
                f"a SinkCache whose rows have padding cannot be cropped: of {columns} columns, {tokens} are tokens"
            )

    def check_drafts(self, length: int) -> None:
        """Raise ValueError unless tokens of a text of `length` can be drafted and rolled back all along."""
        if length > self.sizes.slots:
            raise ValueError(
                f"assisted decoding with a SinkCache needs room for the prompt and all new tokens, since rejected "
                f"tokens are rolled back; got {length} tokens for {self.sizes.slots} slots (sink_tokens + window)"
            )

    def _rows(self, index: Tensor, linear: Any) -> None:
        if self._counts is None:
            return
        self._counts = _rows(self._counts, index, 1)  # first: raises for an invalid row before anything is changed
        for layer in self.layers:
            layer.rows(index) if isinstance(layer, SinkLayer) else linear(layer)


def _tensors(layer: Any) -> list[Tensor]:
    if isinstance(layer, SinkLayer):
        return layer.buffers()
    return [x for states in (layer.conv_states, layer.recurrent_states) for x in states.values() if x is not None]
