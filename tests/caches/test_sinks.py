"""SinkCache against an oracle that shares nothing with it: every token's attention is computed anew, by the model's own
module, from the hidden states of the tokens that are kept, at positions 0, 1, 2, ... and without any cache.
"""

import copy
import os

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoTokenizer, CompileConfig, pipeline

import hf_gdn
from hf_gdn.caches import SinkCache
from hf_gdn.caches.sinks import SUPPORTED
from hf_gdn.caches.sinks.plan import Sizes, plan_piece
from hf_gdn.eval.long_stream import PlainWindow
from hf_gdn.loading.models import ASSETS
from hf_gdn.testing import assert_close, error
from hf_gdn.testing.tolerances import LAYER
from tests import tiny_models as tiny

SINKS, WINDOW = 4, 8
FAMILIES = sorted(set(SUPPORTED) & set(tiny.CONFIGS))
LAYERS = dict(layer_types=["linear_attention", "full_attention"] * 2)  # two of full attention, one upon the other
GENERATE = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.fixture(params=FAMILIES)
def family(request):
    """Name of a family that has sinks."""
    return request.param


@pytest.fixture(autouse=True)
def _patched_for_inference():
    with hf_gdn.patched(strict=True), torch.no_grad():
        yield


def oracle(model, ids, sinks=SINKS, window=WINDOW):
    """Logits ``[1, T, vocabulary]``; what the module's docstring says, in O(T (sinks + window)^2)."""
    text = model.model
    rotary = getattr(text, "rotary_emb", None)

    def stand_in(attention):
        def forward(hidden_states, **_):
            outs = []
            for last in range(hidden_states.shape[1]):
                kept = [*range(min(sinks, last + 1)), *range(max(sinks, last + 1 - window), last + 1)]
                x = hidden_states[:, kept]
                at = torch.arange(len(kept))[None]
                at = at.expand(3, 1, -1) if hasattr(rotary, "mrope_section") else at
                positions = {} if rotary is None else {"position_embeddings": rotary(x, at)}
                outs.append(type(attention).forward(attention, x, attention_mask=None, **positions)[0][:, -1:])
            return torch.cat(outs, 1), None

        return forward

    layers = [layer for layer, kind in zip(text.layers, model.config.layer_types) if kind == "full_attention"]
    try:
        for layer in layers:
            layer.self_attn.forward = stand_in(layer.self_attn)
        return model(ids, use_cache=False).logits
    finally:
        for layer in layers:
            del layer.self_attn.forward


def read(model, ids, cuts, cache=None, **kwargs):
    """Logits of ids read in pieces of these lengths, 1 at a time after the last."""
    cache = SinkCache(model.config, SINKS, WINDOW) if cache is None else cache
    rest = ids.shape[1] - sum(cuts)
    return torch.cat([model(x, **tiny.given(cache), **kwargs).logits for x in ids.split([*cuts, *[1] * rest], 1)], 1)


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "cuts", [(), (100,), (12, 88), (3, 30, 1, 2, 40), (1, 99), (50,)],
    ids=["token by token", "one piece", "full, then evicting", "pieces", "one, then a piece", "piece, then tokens"],
)  # fmt: skip
def test_reads_what_is_kept_at_positions_inside_the_cache(family, cuts):
    model = tiny.model(family, **LAYERS)
    ids, _ = tiny.batch(1, 100)
    assert_close("logits", read(model, ids, cuts), oracle(model, ids), LAYER)


@pytest.mark.parametrize("sinks, window", [(0, 8), (0, 1), (1, 1), (1, 16), (7, 3), (4, 200)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sizes(sinks, window, attention):
    model = tiny.model("qwen3_next", **LAYERS)
    model.set_attn_implementation(attention)
    ids, _ = tiny.batch(1, 60)
    wanted = oracle(model, ids, sinks, window)
    for cuts in ((), (60,), (3, 20)):
        got = read(model, ids, cuts, (SinkCache if sinks else PlainWindow)(model.config, sinks, window))
        assert_close(f"logits, {cuts}", got, wanted, LAYER)


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3"])
def test_rotary_types_that_are_relative(name):
    rope = dict(
        rope_type=name, rope_theta=1e4, factor=4.0, original_max_position_embeddings=64, low_freq_factor=1.0,
        high_freq_factor=4.0, partial_rotary_factor=0.5,
    )  # fmt: skip
    model = tiny.model("qwen3_next", rope_parameters=rope, **LAYERS)
    ids, _ = tiny.batch(1, 60)
    assert model.model.rotary_emb.rope_type == name
    assert_close("logits", read(model, ids, (20, 15)), oracle(model, ids), LAYER)


def test_nothing_adds_up_in_bf16():
    """After 40 eras bf16 is as far from fp32 as the oracle in bf16 is."""
    model = tiny.model("qwen3_next", **LAYERS)
    ids, _ = tiny.batch(1, 700)
    exact = oracle(model, ids)[:, -50:]
    model.bfloat16()
    own = error(oracle(model, ids)[:, -50:].float(), exact)
    assert_close("logits", read(model, ids, ())[:, -50:].float(), exact, 2 * own)


def test_positions_stay_small():
    """They do not grow with the stream: below C + era + T."""
    model = tiny.model("qwen3_next")
    ids, _ = tiny.batch(1, 300)
    seen = []
    model.model.rotary_emb.register_forward_pre_hook(lambda _, args: seen.append(int(args[1].max())))
    read(model, ids, (10, 10))
    assert max(seen) < SINKS + WINDOW + 16 + 10


# -------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("where", ["left", "anywhere"])
@pytest.mark.parametrize("cuts", [(40,), (7, 33), (2, 3, 35)])
def test_padding_is_neither_kept_nor_read(family, where, cuts):
    """Every row as alone; (2, 3, 35) begins with pieces that are all padding in some row."""
    model = tiny.model(family, **LAYERS)
    ids, mask = tiny.batch(3, 60)
    mask[:, 40:] = 1
    if where == "anywhere":
        mask[0, 5:9] = mask[1, 33:37] = mask[0, 20] = 0
    cache = SinkCache(model.config, SINKS, WINDOW)
    got, at = [], 0
    for length in [*cuts, *[1] * 20]:
        piece = slice(at, at + length)
        at += length
        got.append(model(ids[:, piece], attention_mask=mask[:, :at], **tiny.given(cache)).logits)
    got = torch.cat(got, 1)
    for row in range(3):
        alone = oracle(model, ids[row : row + 1, mask[row] == 1])
        assert_close(f"row {row}", got[row : row + 1, mask[row] == 1], alone, LAYER)


def test_padding_one_column_at_a_time():
    model = tiny.model("qwen3_next", **LAYERS)
    ids, mask = tiny.batch(3, 40)
    cache = SinkCache(model.config, SINKS, WINDOW)
    got = [
        model(ids[:, n : n + 1], attention_mask=mask[:, : n + 1], **tiny.given(cache)).logits for n in range(40)
    ]  # fmt: skip
    for row in range(3):
        alone = oracle(model, ids[row : row + 1, mask[row] == 1])
        assert_close(f"row {row}", torch.cat(got, 1)[row : row + 1, mask[row] == 1], alone, LAYER)


def test_padding_sees_itself():
    """A row of a mask that shows nothing would be NaN in some attention kernels, and NaN goes on to tokens."""
    real = torch.tensor([[False, False, True, True], [True, False, True, True]])
    for n in (0, 3, 40):
        counts = torch.tensor([n, n])
        _, seen, _ = plan_piece(Sizes(2, 3), counts, torch.zeros_like(counts), None, [n, n], real)
        assert seen.any(-1).all()


# ------------------------------------------------------------------------------------------------------------- generate


def alone(model, ids, tokens=20):
    """Greedy tokens by the oracle."""
    for _ in range(tokens):
        ids = torch.cat((ids, oracle(model, ids)[:, -1:].argmax(-1)), 1)
    return ids[0, -tokens:].tolist()


@pytest.mark.parametrize("how", [dict(), dict(prefill_chunk_size=7)], ids=["whole", "in pieces"])
def test_generate_a_padded_batch(family, how):
    model = tiny.model(family)
    ids, mask = tiny.batch(3, 30)
    cache = SinkCache(model.config, SINKS, WINDOW)
    got = model.generate(ids, attention_mask=mask, **tiny.given(cache), **GENERATE, **how)[:, 30:]
    assert got.tolist() == [alone(model, ids[row : row + 1, mask[row] == 1]) for row in range(3)]
    assert cache.get_seq_length() == 49


def test_a_copy_goes_on_by_itself(family):
    """Branches of a conversation, to the bit, tokens having been evicted before and after."""
    model = tiny.model(family)
    ids, others = (tiny.batch(2, 60, seed=seed)[0] for seed in (0, 1))
    cache = SinkCache(model.config, SINKS, WINDOW)
    with torch.no_grad():
        for piece in ids[:, :40].split(10, 1):
            model(piece, **tiny.given(cache))
        branch = copy.deepcopy(cache)
        for piece in others.split(1, 1):
            model(piece, **tiny.given(branch))
        whole = copy.deepcopy(cache)
        for piece in ids[:, 40:].split(1, 1):
            got, wanted = (model(piece, **tiny.given(each)).logits for each in (cache, whole))
            assert torch.equal(got, wanted)
    assert cache.get_seq_length() == whole.get_seq_length() == 60 and branch.get_seq_length() == 100


def test_generate_compiled():
    """As `generate` compiles by itself on a GPU, here by dynamo without a code generator."""
    model = tiny.model("qwen3_next")
    ids, mask = tiny.batch(3, 30)
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    got, wanted = (
        model.generate(
            ids, attention_mask=mask, **tiny.given(SinkCache(model.config, SINKS, WINDOW)), **GENERATE, **how
        )
        for how in (dict(compile_config=compiled), dict())
    )
    assert torch.equal(got, wanted)


def test_a_chat_goes_on():
    """A second turn is only the new tokens, or all of them, as transformers' caches have it."""
    model = tiny.model("qwen3_next")
    ids, _ = tiny.batch(1, 40)
    both = []
    for whole in (False, True):
        cache = SinkCache(model.config, SINKS, WINDOW)
        said = model.generate(ids[:, :25], **tiny.given(cache), **GENERATE)
        text = torch.cat((said, ids[:, 25:]), 1)
        if whole:
            both.append(model.generate(text, **tiny.given(cache), **GENERATE)[:, text.shape[1] :])
        else:
            new = text[:, cache.get_seq_length() :]
            mask = torch.ones_like(text)
            both.append(model.generate(new, attention_mask=mask, **tiny.given(cache), **GENERATE)[:, new.shape[1] :])
    assert both[0].tolist() == both[1].tolist() == [alone(model, text)]


def test_pipeline_accepts_it():
    where = ASSETS / "qwen3_next-tiny"
    tokenizer = AutoTokenizer.from_pretrained(where)
    write = pipeline("text-generation", model=str(where), tokenizer=tokenizer, device="cpu")
    text = "import os\nimport sys\n\n\ndef main(arguments):\n    "
    wanted, narrow = (
        write(
            text, **tiny.given(SinkCache(write.model.config, 4, window)), max_new_tokens=30, do_sample=False,
            return_full_text=False,
        )[0]["generated_text"]
        for window in (4092, 8)
    )  # fmt: skip
    plain = write(text, max_new_tokens=30, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert plain == wanted != narrow


def test_beams(family):
    """With room for all, beams are those of transformers' own cache; without, they run on what is kept."""
    model = tiny.model(family)
    ids, mask = tiny.batch(2, 20)
    search = dict(GENERATE, num_beams=3, attention_mask=mask)
    wanted = model.generate(ids, **search)
    assert torch.equal(model.generate(ids, **tiny.given(SinkCache(model.config, 4, 60)), **search), wanted)
    narrow = model.generate(ids, **tiny.given(SinkCache(model.config, SINKS, WINDOW)), **search)
    for row in range(2):
        row_ids = ids[row : row + 1, mask[row] == 1]
        one = model.generate(
            row_ids, **tiny.given(SinkCache(model.config, SINKS, WINDOW)), **dict(search, attention_mask=None)
        )
        assert narrow[row, 20:].tolist() == one[0, row_ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "method, argument, rows",
    [
        ("reorder_cache", torch.tensor([1, 1, 0]), [1, 1, 0]),
        ("batch_select_indices", torch.tensor([2, 0]), [2, 0]),
        ("batch_select_indices", torch.tensor([False, True, True]), [1, 2]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "select by mask", "repeat"],
)
def test_rows_go_on_alone(family, method, argument, rows):
    model = tiny.model(family)
    ids, mask = tiny.batch(3, 40)
    mask[:, 30:] = 1
    cache = SinkCache(model.config, SINKS, WINDOW)
    model(ids[:, :30], attention_mask=mask[:, :30], **tiny.given(cache))
    getattr(cache, method)(argument)
    got = torch.cat([model(ids[rows, n : n + 1], **tiny.given(cache)).logits for n in range(30, 40)], 1)
    for place, row in enumerate(rows):
        wanted = oracle(model, ids[row : row + 1, mask[row] == 1])[:, -10:]
        assert_close(f"row {row}", got[place : place + 1], wanted, LAYER)


def test_reset_and_another_batch(family):
    model = tiny.model(family)
    ids, _ = tiny.batch(2, 30)
    cache = SinkCache(model.config, SINKS, WINDOW)
    wanted = read(model, ids, (10,), cache)
    where = [x.data_ptr() for layer in cache.layers for x in _buffers(layer)]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(read(model, ids, (10,), cache), wanted)
    assert [x.data_ptr() for layer in cache.layers for x in _buffers(layer)] == where
    cache.reset()
    assert_close("one row", read(model, ids[:1], (10,), cache), wanted[:1], LAYER)


# ----------------------------------------------------------------------------------------------------- memory and graph


def _buffers(layer):
    return layer.buffers() if hasattr(layer, "buffers") else [layer.conv_states[0], layer.recurrent_states[0]]


# 100,000 tokens are ten minutes a family: HF_GDN_LONG=100000 asks for them.
@pytest.mark.parametrize("tokens", [int(os.environ.get("HF_GDN_LONG", 400))])
def test_memory_is_constant(family, tokens):
    """Nothing is allocated, nothing grows: the buffers that the first tokens made, and bytes by docs/caches.md."""
    model = tiny.model(family)
    cache = SinkCache(model.config, SINKS, WINDOW)
    token = torch.tensor([[5]])
    model(token, **tiny.given(cache))
    held = [(x.data_ptr(), tuple(x.shape)) for layer in cache.layers for x in _buffers(layer)]
    for _ in range(tokens - 1):
        token = model(token, **tiny.given(cache)).logits[:, -1:].argmax(-1)
    assert [(x.data_ptr(), tuple(x.shape)) for layer in cache.layers for x in _buffers(layer)] == held
    assert cache.get_seq_length() == tokens
    config, layer = model.config, cache.layers[3]
    if hasattr(config, "kv_lora_rank"):
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
        rotary = config.qk_rope_head_dim if family == "bailing_hybrid" else 0
    else:
        heads = config.num_key_value_heads
        numbers, rotary = 2 * heads * config.head_dim, heads * 2 * len(model.model.rotary_emb.inv_freq)
    assert sum(x.nbytes for x in layer.buffers()) == 4 * (numbers * (SINKS + WINDOW) + rotary * SINKS)


def test_decoding_is_one_graph(family):
    """Compiled once, whatever the numbers: before anything is evicted, while it is, and over eras."""
    model = tiny.model(family)
    ids, mask = tiny.batch(3, 60)
    mask[:, 6:] = 1
    count, got = CompileCounter(), {}
    for how in (model, torch.compile(model, fullgraph=True, backend=count)):
        cache = SinkCache(model.config, SINKS, WINDOW)
        out = [model(ids[:, :6], attention_mask=mask[:, :6], **tiny.given(cache)).logits]
        out += [how(input_ids=ids[:, n : n + 1], **tiny.given(cache)).logits for n in range(6, 60)]
        got[how] = torch.cat(out, 1)
        assert cache.get_seq_length() == 60
    assert count.frame_count == 1
    assert_close("logits", *got.values(), LAYER)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "sizes, error, text",
    [
        ((0, 8), ValueError, "sink_tokens must be at least 1, got 0"),
        ((-1, 8), ValueError, "sink_tokens must be at least 1, got -1"),
        ((4, 0), ValueError, "window must be at least 1, got 0"),
        ((4, -8), ValueError, "window must be at least 1, got -8"),
        ((4, 8.0), TypeError, "window must be an int, got 8.0"),
        ((True, 8), TypeError, "sink_tokens must be an int, got True"),
    ],
)
def test_sizes_that_make_no_sense(sizes, error, text):
    with pytest.raises(error, match=text):
        SinkCache(tiny.config("qwen3_next"), *sizes)


@pytest.mark.parametrize("name", sorted(set(tiny.CONFIGS) - set(SUPPORTED)))
def test_families_without_sinks(name):
    with pytest.raises(ValueError, match=f"no attention sinks for model type '{name}': its (indexer|sliding-window)"):
        SinkCache(tiny.config(name))


def test_rotary_types_that_are_not_relative():
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0, partial_rotary_factor=0.25)
    with pytest.raises(ValueError, match="rotary type 'dynamic'"):
        SinkCache(tiny.config("qwen3_next", rope_parameters=rope))


def _calls(model, ids):
    """What is wrong, by the words of its error."""
    packed = dict(seq_idx=torch.zeros_like(ids))
    image = torch.arange(30).expand(3, 2, 30).clone()
    image[1] += 1
    return {
        "the SinkCache holds 2 rows, the model was given 1": dict(input_ids=ids[:1]),
        "attention_mask must be": dict(input_ids=ids, attention_mask=torch.ones(2, 31)),
        "one sequence per row, not packed sequences; got seq_idx": dict(input_ids=ids, **packed),
        "images": dict(input_ids=ids, position_ids=image),
        "neither input_ids nor inputs_embeds": dict(),
    }


def test_what_is_wrong_changes_nothing():
    model = tiny.model("qwen3_5")
    ids, _ = tiny.batch(2, 30)
    cache = SinkCache(model.config, SINKS, WINDOW)
    read(model, ids, (10,), cache)
    before = [x.clone() for layer in cache.layers for x in _buffers(layer)]
    for text, call in _calls(model, ids).items():
        with pytest.raises(ValueError, match=text):
            model.model(**tiny.given(cache), **call)
    with torch.enable_grad(), pytest.raises(ValueError, match="no_grad"):
        model(ids, **tiny.given(cache))
    model.config._attn_implementation = "flex_attention"  # which transformers refuses for some of these models, too
    with pytest.raises(ValueError, match="flex_attention"):
        model(ids, **tiny.given(cache))
    with pytest.raises(RuntimeError, match="has evicted tokens cannot be cropped: it was given 30 and keeps 12"):
        cache.crop(-1)
    with pytest.raises(IndexError):
        cache.reorder_cache(torch.tensor([0, 5]))
    assert cache.get_seq_length() == 30
    assert all(map(torch.equal, before, [x for layer in cache.layers for x in _buffers(layer)]))


def test_tokens_are_rolled_back_while_none_is_evicted(family):
    """In every length; what is read then is the same as if they had never been read."""
    model = tiny.model(family)
    ids, _ = tiny.batch(1, 16)
    cache = SinkCache(model.config, SINKS, WINDOW)
    cache.activate_past_recording()
    read(model, ids[:, :6], (6,), cache)
    for count in (1, 2, 5):
        read(model, ids[:, 16 - count :], (count,), cache)
        cache.crop(-count)
        assert cache.get_seq_length() == 6
    found = read(model, ids[:, 6:], (1, 3, 6), cache)
    wanted = read(model, ids, (6, 1, 3, 6), SinkCache(model.config, SINKS, WINDOW))
    assert_close("logits", found, wanted[:, 6:], LAYER)
    with pytest.raises(RuntimeError, match="it was given 16 and keeps 12"):
        cache.crop(-1)


def test_padded_rows_are_not_rolled_back():
    model = tiny.model("qwen3_5")
    ids, _ = tiny.batch(1, 6)
    cache = SinkCache(model.config, SINKS, WINDOW)
    cache.activate_past_recording()
    model(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]), **tiny.given(cache))
    with pytest.raises(RuntimeError, match="padding"):
        cache.crop(-1)


@pytest.mark.parametrize("drafts", ["prompt lookup", "assistant"])
def test_drafts(family, drafts):
    """Tokens are those of plain decoding; without room for all of them nothing is read."""
    model = tiny.model(family)
    ids = torch.tensor([[5, 6, 7, 8, 9] * 4])
    given = {"prompt_lookup_num_tokens": 4} if drafts == "prompt lookup" else {"assistant_model": tiny.model(family)}
    wanted = model.generate(ids, **GENERATE)
    assert torch.equal(
        model.generate(ids, **GENERATE, **given, **tiny.given(SinkCache(model.config, SINKS, 36))), wanted
    )
    small = SinkCache(model.config, SINKS, 35)
    with pytest.raises(ValueError, match=r"got 40 tokens for 39 slots \(sink_tokens \+ window\)"):
        model.generate(ids, **GENERATE, **given, **tiny.given(small))
    assert small.get_seq_length() == 0


def test_unpatched_models_cannot_fill_it():
    model = tiny.model("qwen3_next")
    ids, _ = tiny.batch(1, 5)
    with hf_gdn.unpatched(), pytest.raises(RuntimeError, match=r"hf_gdn.patch\(\)"):
        model(ids, **tiny.given(SinkCache(model.config)))
