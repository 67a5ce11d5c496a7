"""Multi-token prediction: the head against a loop without caches, tokens of generate, checkpoints of every layout."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
)

import hf_gdn
from hf_gdn.caches import SinkCache
from hf_gdn.drafting import mtp as drafts
from hf_gdn.drafting.mtp import LONGEST, MtpDrafts
from hf_gdn.drafting.mtp_head import head_of
from hf_gdn.drafting.mtp_layer import Rotary
from hf_gdn.loading.models import ASSETS
from hf_gdn.loading.stdlib_text import held_out_text
from hf_gdn.patches.families.base import MTP
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER
from tests import sampling
from tests import tiny_models as tiny
from tests.drafting import heads

SERVED = [name for name, family in tiny.patches.all_families().items() if MTP not in dict(family.cannot)]
SERVED = [name for name in SERVED if name in tiny.CONFIGS]
some = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.extended] * (name in tiny.EXTENDED)) for name in SERVED]
)


@pytest.fixture
def saved(tmp_path):
    """Saves a family's model with a head; returns its folder."""

    def save(family, *, vision=False, **options):
        built = tiny.with_vision(family) if vision else tiny.lively(family)
        heads.save(built, tmp_path, **options)
        return tmp_path

    return save


def generate(model, ids, **options):
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, **options)


# ------------------------------------------------------------------------------------------------------------ the head


def norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


def drafted_without_caches(model, head, ids, hidden, longest):
    """Logits ``[longest, vocabulary]`` of a greedy draft behind ids ``[L]``, from hidden states ``[L - 1, hidden]``."""
    layer, eps, found = head.layer, head.layer.config.rms_norm_eps, []
    for _ in range(longest):
        length = len(ids) - 1
        e = norm(model.get_input_embeddings().weight[ids[1:]], layer.enorm.weight, eps)
        u = F.linear(torch.cat((e, norm(hidden, layer.hnorm.weight, eps)), -1), layer.eh_proj.weight)[None]
        positions = torch.arange(length)[None]
        rotary = model.get_decoder().rotary_emb
        grid = positions.expand(3, 1, -1) if hasattr(rotary, "mrope_section") else positions
        embedded = rotary(u, position_ids=grid)
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        d = layer.mtp_block(u, attention_mask=mask, position_embeddings=embedded, position_ids=positions)
        d = norm(d[0, -1:], layer.post_norm.weight, eps)
        found.append(F.linear(d, model.get_output_embeddings().weight)[0])
        ids, hidden = torch.cat((ids, found[-1].argmax()[None])), torch.cat((hidden, d))
    return torch.stack(found)


@some
def test_drafts_are_those_of_a_loop_without_caches(saved, family):
    """Over 300 tokens; a draft is accepted to every length, none of it included, and drafting pauses."""
    model = heads.load(saved(family))
    with torch.no_grad():
        ids = torch.randint(3, 128, (1, 300), generator=torch.Generator().manual_seed(1))
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
        options = GenerationConfig(max_length=400, num_assistant_tokens=3)
        options._eos_token_tensor = None
        subject = MtpDrafts(model, head_of(model), options, LogitsProcessorList())
        at, read, rounds = 20, 0, 0
        subject.pace = SimpleNamespace(length=lambda: 0 if rounds % 7 == 5 else 3, learn=lambda drafted, accepted: None)
        assert subject.get_candidates(ids[:, :at], {}, None, True, None)[1] is None
        while at < 290:
            # The model has read all tokens but the last, and behind those some that were refused.
            outputs = SimpleNamespace(
                hidden_states=(None, F.pad(hidden[:, read : at - 1], (0, 0, 0, 2 if read else 0)))
            )
            given = {"position_ids": torch.arange(at)[None]}
            found, logits = subject.get_candidates(ids[:, :at], given, outputs, False, at - 2 - read)
            if rounds % 7 == 5:
                assert logits is None and found.shape[1] == at
            else:
                wanted = drafted_without_caches(
                    model, head_of(model), ids[0, :at], hidden[0, : at - 1], logits.shape[1]
                )
                assert_close(f"logits at {at}", logits[0], wanted, 1e-5)
                assert torch.equal(found[0, at:], logits[0].argmax(-1))
            accepted = rounds % 4 if logits is not None else 0
            subject.update_candidate_strategy(None, None, min(accepted, subject.drafted))
            read, at, rounds = at - 1, at + 1 + accepted, rounds + 1
    assert rounds > 80


def test_the_hidden_state_is_that_after_the_final_norm(saved):
    model = heads.load(saved("qwen3_next"))
    ids, _ = tiny.batch(1, 10)
    with torch.no_grad():
        outputs = model(ids, **drafts.mtp.last_hidden_states())
        wanted = model.get_decoder()(ids).last_hidden_state
    assert torch.equal(outputs.hidden_states[-1], wanted)


def test_the_hidden_state_before_the_norm_predicts_worse():
    """With the embedded model's trained head, on held-out text. Little, for the head norms what it reads: only the
    weights of the model's final norm are missing, and these are nearly equal."""
    folder = ASSETS / "qwen3_next-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(held_out_text()[:12000])["input_ids"])[:2048].view(4, 512)
    before, losses, same = [], [], []
    model.get_decoder().norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    with torch.no_grad():
        after = model.get_decoder()(ids, use_cache=False).last_hidden_state
        wanted = model.get_output_embeddings()(after)[:, 1:].softmax(-1)
        for hidden in (after, before[0]):
            head = head_of(model)
            rotary = Rotary.of(model, hidden, torch.arange(511)[None])
            read = head.read(model.get_input_embeddings()(ids[:, 1:]), hidden[:, :-1], rotary, None)
            found = model.get_output_embeddings()(read)
            losses.append(F.cross_entropy(found.flatten(0, 1), wanted.flatten(0, 1)).item())
            same.append((found.argmax(-1) == wanted.argmax(-1)).double().mean().item())
    assert same[0] > 0.55 and losses[1] > losses[0] + 1e-3, (same, losses)


# -------------------------------------------------------------------------------------------------------------- tokens


@some
@pytest.mark.parametrize("tokens", [None, 1, 7])
def test_greedy_tokens_are_the_models_own(saved, family, tokens):
    model = heads.load(saved(family))
    ids, _ = tiny.batch(1, 33)
    given = {} if tokens is None else {"num_assistant_tokens": tokens}
    with hf_gdn.patched(family, strict=True):
        assert torch.equal(generate(model, ids, use_mtp=True, **given), generate(model, ids))


def perfect(monkeypatch, model, text):
    """Make the head's drafts right: those of a text."""

    def logits(self, hidden, known, drafted):
        return F.one_hot(text[:, known.shape[1] + len(drafted)], model.config.vocab_size).float() * 9

    monkeypatch.setattr(MtpDrafts, "_logits", logits)


@pytest.mark.parametrize("end", [None, 3, 10])
def test_right_drafts_save_forwards_and_stop_where_the_text_ends(saved, monkeypatch, end):
    model = heads.load(saved("qwen3_next"))
    ids, _ = tiny.batch(1, 33)
    with hf_gdn.patched("qwen3_next", strict=True):
        wanted = generate(model, ids)
        if end is not None:
            model.generation_config.eos_token_id = int(wanted[0, 33 + end])
            wanted = generate(model, ids)
        perfect(monkeypatch, model, F.pad(wanted, (0, 10), value=7))
        forwards, forward = [], type(model).forward
        monkeypatch.setattr(type(model), "forward", lambda *a, **k: (forwards.append(1), forward(*a, **k))[1])
        assert torch.equal(generate(model, ids, use_mtp=True), wanted)
    new = wanted.shape[1] - 33
    assert len(forwards) <= 2 + -(-new // (LONGEST + 1))


def test_the_models_vision_keeps_its_positions(saved):
    model = heads.load(saved("qwen3_5", vision=True), vision=True)
    prompt = tiny.with_image([5, 6, 7], [8, 9, 10, 11])
    given = dict(prompt, attention_mask=torch.ones_like(prompt["input_ids"]), max_new_tokens=12, do_sample=False)
    with hf_gdn.patched("qwen3_5", strict=True):
        wanted = model.generate(**given)
        assert torch.equal(model.generate(**given, use_mtp=True), wanted)


def test_sampling_is_the_models_own_distribution(tmp_path):
    """Of pairs of tokens, against the original's exact probabilities; a third one, so that some are drafted."""
    sizes = dict(vocab_size=sampling.VOCABULARY, pad_token_id=None, eos_token_id=None)
    heads.save(sampling.sharpened(tiny.model("qwen3_5", **sizes)), tmp_path)
    model = heads.load(tmp_path)
    exact = sampling.exact_pairs(model)
    with hf_gdn.patched("qwen3_5", strict=True):
        sampling.assert_sampled_from(exact, model, new_tokens=3, use_mtp=True)


# --------------------------------------------------------------------------------------------------------- checkpoints


@some
@pytest.mark.parametrize("shards", [1, 3])
def test_heads_of_checkpoints_in_every_layout(saved, family, shards):
    """One file or several with an index, in bf16; one tensor per expert, or one of all."""
    folder = saved(family, shards=shards, change=lambda head: {name: value.bfloat16() for name, value in head.items()})
    model = heads.load(folder, dtype=torch.bfloat16)
    head, wanted = head_of(model), heads.random_head(tiny.lively(family))
    for (name, value), expected in zip(head.layer.state_dict().items(), wanted.layer.state_dict().values()):
        assert torch.equal(value, expected.bfloat16()), name
    assert head_of(model) is head  # loaded once
    gone = weakref.ref(head)
    del model, head
    gc.collect()
    assert gone() is None


def without(name):
    return lambda head: {key: value for key, value in head.items() if key != name}


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda head: {}, "use_mtp=True needs a checkpoint with tensors mtp"),
        (without("mtp.fc.weight"), "mtp.fc.weight is missing"),
        (without("mtp.layers.0.self_attn.q_proj.weight"), "mtp.layers.0.self_attn.q_proj.weight is missing"),
        (without("mtp.layers.0.mlp.experts.2.up_proj.weight"), "mtp.layers.0.mlp.experts.gate_up_proj is missing"),
        (
            lambda head: head | {"mtp.fc.weight": torch.zeros(32, 32)},
            r"mtp.fc.weight is \[32, 32\], expected \[32, 64\]",
        ),
        (lambda head: head | {"mtp.layers.1.x": torch.zeros(1)}, "mtp.layers.1.x is not of such a head"),
        (
            lambda head: head | {"mtp.fc.weight_scale_inv": torch.ones(1)},
            "is quantized, which is not supported",
        ),
    ],
)
def test_a_head_that_cannot_be_loaded(saved, change, text):
    model = heads.load(saved("qwen3_next", change=change))
    ids, _ = tiny.batch(1, 5)
    with hf_gdn.patched("qwen3_next"):
        for _ in range(2):
            with pytest.raises(ValueError, match=text):
                generate(model, ids, use_mtp=True)
        assert generate(model, ids).shape[1] == 29


def test_models_without_a_head(family):
    model, (ids, _) = tiny.model(family), tiny.batch(1, 5)
    with (
        hf_gdn.patched(family),
        pytest.raises(ValueError, match="use_mtp=True (is not supported: |needs a checkpoint)"),
    ):
        generate(model, ids, use_mtp=True)


def test_several_rows_are_refused(saved):
    model, (ids, _) = heads.load(saved("qwen3_next")), tiny.batch(2, 5)
    with hf_gdn.patched("qwen3_next"), pytest.raises(ValueError, match="batch"):
        generate(model, ids, use_mtp=True)


def test_a_cache_that_holds_the_beginning(saved):
    """The head starts without it; the tokens are the same."""
    model, (ids, _) = heads.load(saved("qwen3_next")), tiny.batch(1, 33)
    with hf_gdn.patched("qwen3_next", strict=True):
        wanted, cache = generate(model, ids), DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :20], **tiny.given(cache))
        assert torch.equal(generate(model, ids, use_mtp=True, **tiny.given(cache)), wanted)
        assert torch.equal(generate(model, ids, use_mtp=True, **tiny.given(SinkCache(model.config, 4, 80))), wanted)


def test_a_prompt_of_embeddings_and_hidden_states_that_are_asked_for(saved):
    model, (ids, _) = heads.load(saved("qwen3_next")), tiny.batch(1, 33)
    given = dict(max_new_tokens=24, do_sample=False)
    with hf_gdn.patched("qwen3_next", strict=True):
        embeds = model.get_input_embeddings()(ids)
        wanted = model.generate(inputs_embeds=embeds, **given)
        assert torch.equal(model.generate(inputs_embeds=embeds, use_mtp=True, **given), wanted)
        named = dict(return_dict_in_generate=True, output_hidden_states=True)
        plain, got = generate(model, ids, **named), generate(model, ids, use_mtp=True, **named)
    assert torch.equal(got.sequences, plain.sequences) and len(got.hidden_states) == len(plain.hidden_states)
    for one, other in zip(got.hidden_states, plain.hidden_states):
        for x, y in zip(one, other, strict=True):
            assert_close("hidden states", x[:, : y.shape[1]], y, LAYER)


class Int8(torch.nn.Module):
    """A linear layer as quantizers leave it."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().amax() / 127
        self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).mT


def test_models_whose_weights_are_elsewhere_or_quantized(saved, tmp_path):
    """The last layer's parameters tell neither the dtype nor the device in which it computes."""
    folder, (ids, _) = saved("qwen3_next"), tiny.batch(1, 33)
    with hf_gdn.patched("qwen3_next", strict=True):
        wanted = generate(heads.load(folder), ids)
        layers = len(heads.load(folder).get_decoder().layers)
        places = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"), "cpu")
        places |= {f"model.layers.{n}": "cpu" for n in range(layers - 1)} | {f"model.layers.{layers - 1}": "disk"}
        offloaded = heads.load(folder, device_map=places, offload_folder=tmp_path / "offloaded")
        assert torch.equal(generate(offloaded, ids, use_mtp=True), wanted)
        model = heads.load(folder)
        layer = model.get_decoder().layers[-1].self_attn
        layer.q_proj = Int8(layer.q_proj)
        assert torch.equal(generate(model, ids, use_mtp=True), generate(model, ids))
        model = heads.load(folder)
        with torch.inference_mode():
            assert torch.equal(generate(model, ids, use_mtp=True), wanted)
        model.bfloat16()  # an inference tensor could not be changed
        assert torch.equal(generate(model, ids, use_mtp=True), generate(model, ids))
