"""Snapshots of caches: going on from one gives what one full forward of the original model gives."""

from itertools import pairwise

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

import hf_gdn
from hf_gdn import caches
from hf_gdn.caches import SnapshotError
from hf_gdn.caches.snapshots.fingerprint import layer_devices
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER
from tests import tiny_models as tiny
from tests.caches import cache_contents

MAKE = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=48),
}


@pytest.fixture(params=[True, False], ids=["patched", "original"])
def patched(request):
    if request.param:
        hf_gdn.patch(strict=True)
    return request.param


def logits(model, ids, cache):
    with torch.no_grad():
        return model(ids, **tiny.given(cache)).logits


def text(rows=2, tokens=40, seed=0):
    """Token ids; shorter texts of a seed are beginnings of longer ones."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (48, rows), generator=random).T[:, :tokens].contiguous()


def go_on(model, ids, cache, start=20):
    """Logits of the tokens from `start` on, in pieces of several and of one."""
    pieces = [start, start + 9, start + 10, start + 11, ids.shape[1]]
    return torch.cat([logits(model, ids[:, a:b], cache) for a, b in pairwise(pieces)], 1)


def full(model, ids):
    """Logits of the original model, which reads all of it at once, without a cache."""
    with hf_gdn.unpatched(), torch.no_grad():
        return model(ids, use_cache=False).logits


def filled(model, rows=2, tokens=20, make="dynamic", seed=0):
    cache = MAKE[make](model)
    logits(model, text(rows, tokens, seed), cache)
    return cache


@pytest.mark.parametrize("make", MAKE)
def test_going_on_gives_the_same_bits(family, make, patched):
    model = tiny.model(family)
    ids = text()
    cache = MAKE[make](model)
    logits(model, ids[:, :20], cache)
    snapshot = caches.snapshot(cache, model)
    before = cache_contents.parts(snapshot)
    wanted = go_on(model, ids, cache)
    if patched or family != "olmo_hybrid":  # whose original in transformers 5.17 is off, see docs/differences.md
        assert_close("without", wanted, full(model, ids)[:, 20:], LAYER)
    caches.restore(cache, snapshot)
    assert torch.equal(go_on(model, ids, cache), wanted), "in use"
    fresh = MAKE[make](model)
    caches.restore(fresh, snapshot, model)
    assert torch.equal(go_on(model, ids, fresh), wanted), "fresh"
    busy = MAKE[make](model)
    logits(model, text(2, 14, seed=1), busy)
    caches.restore(busy, snapshot)
    assert cache_contents.everything(busy).keys() == cache_contents.everything(cache).keys()
    assert torch.equal(go_on(model, ids, busy), wanted), "holding other text"
    assert cache_contents.parts(snapshot) == before


@pytest.mark.parametrize("make, into", [("dynamic", "static"), ("static", "dynamic")])
def test_from_one_class_of_cache_into_the_other(family, make, into, patched):
    model = tiny.model(family)
    ids = text()
    cache, other = MAKE[make](model), MAKE[into](model)
    logits(model, ids[:, :20], cache)
    snapshot = caches.snapshot(cache)
    wanted = go_on(model, ids, cache)
    caches.restore(other, snapshot)
    assert cache_contents.parts(caches.snapshot(other)) == cache_contents.parts(snapshot)
    assert_close("logits", go_on(model, ids, other), wanted, LAYER)


@pytest.mark.parametrize("make", MAKE)
def test_no_memory_is_shared_and_addresses_stay(family, make):
    model = tiny.model(family)
    cache = filled(model, make=make)
    snapshot = caches.snapshot(cache)
    theirs = cache_contents.memory(part for parts in snapshot.layers for part in parts.values())
    assert not theirs & cache_contents.memory(cache_contents.tensors(cache).values())
    ours = {name: tensor.data_ptr() for name, tensor in cache_contents.tensors(cache).items()}
    go_on(model, text(), cache)
    caches.restore(cache, snapshot)
    assert not theirs & cache_contents.memory(cache_contents.tensors(cache).values())
    for name, tensor in cache_contents.tensors(cache).items():
        if "_states." in name or (make == "static" and "position_ids" not in name):
            assert tensor.data_ptr() == ours[name], name
    fresh = MAKE[make](model)
    caches.restore(fresh, snapshot)
    assert not theirs & cache_contents.memory(cache_contents.tensors(fresh).values())


def test_a_static_cache_holds_nothing_of_before():
    """What lies behind the restored tokens is masked, but NaN would shine through the mask."""
    model = tiny.model("qwen3_next")
    cache = filled(model, make="static", tokens=10)
    snapshot = caches.snapshot(cache)
    for tensor in cache_contents.tensors(cache).values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    caches.restore(cache, snapshot)
    ids = text()
    assert_close("logits", logits(model, ids[:, 10:], cache), full(model, ids)[:, 10:], LAYER)


@tiny.mainly("qwen3_next", "glm5_next")
def test_what_a_cache_is_used_with(family):
    """In inference mode, and while it records its past as assisted decoding has it."""
    hf_gdn.patch()
    model = tiny.model(family)
    ids = text()
    wanted = full(model, ids)[:, 20:]
    with torch.inference_mode():
        cache = filled(model)
        snapshot = caches.snapshot(cache)
        go_on(model, ids, cache)
    caches.restore(cache, snapshot)
    caches.restore(cache, snapshot)
    with torch.inference_mode():
        assert_close("inference mode", go_on(model, ids, cache), wanted, LAYER)
    for size in (20, 1):  # more and less than a convolution's window
        recording = MAKE["dynamic"](model)
        recording.activate_past_recording()
        logits(model, ids[:, :size], recording)
        snapshot = caches.snapshot(recording)
        for cache in (MAKE["dynamic"](model), recording, *caches.fork(recording, 1)):
            caches.restore(cache, snapshot)
            got = go_on(model, ids, cache, size)
            assert_close("recorded", got, full(model, ids)[:, size:], LAYER)


def test_an_empty_cache_too(family):
    model = tiny.model(family)
    empty = caches.snapshot(MAKE["dynamic"](model))
    assert (empty.length, empty.batch_size, empty.nbytes, empty.dtype) == (0, 0, 0, None)
    ids = text(2, 30)
    for make in MAKE:
        cache = filled(model, make=make)
        caches.restore(cache, empty)
        assert int(cache.get_seq_length()) == 0
        assert not any(tensor.any() for name, tensor in cache_contents.tensors(cache).items() if "_states." in name)
        assert_close("logits", logits(model, ids, cache), full(model, ids), LAYER)


def test_what_was_recorded_before_a_restore_is_not_taken_back(family):
    hf_gdn.patch()
    model = tiny.model(family)
    ids, cache = text(), MAKE["dynamic"](model)
    cache.activate_past_recording()
    logits(model, ids[:, :20], cache)
    snapshot = caches.snapshot(cache)
    go_on(model, ids, cache)
    caches.restore(cache, snapshot)
    with pytest.raises(RuntimeError, match="recorded 0"):
        cache.crop(-1)
    caches.restore(cache, snapshot)
    logits(model, ids[:, 20:30], cache)
    cache.crop(-10)
    assert_close("taken back", go_on(model, ids, cache), full(model, ids)[:, 20:], LAYER)


def test_notes_of_others_do_not_survive(family):
    """Such as what a layer has recorded of tokens that it no longer holds."""
    model = tiny.model(family)
    cache = filled(model)
    snapshot = caches.snapshot(cache)
    cache.layers[0].__dict__["_notes"] = "on the tokens before"
    (branch,) = caches.fork(cache, 1)
    assert not hasattr(branch.layers[0], "_notes") and cache.layers[0]._notes
    caches.restore(cache, snapshot)
    assert not hasattr(cache.layers[0], "_notes")


# -------------------------------------------------------------------------------------------------------------- fork


@pytest.mark.parametrize("make", MAKE)
def test_branches_are_independent(family, make, patched):
    model = tiny.model(family)
    cache = filled(model, make=make)
    before = cache_contents.everything(cache)
    branches = caches.fork(cache, 3)
    assert all(type(branch) is type(cache) for branch in branches)
    for seed, branch in enumerate(branches):
        ids = torch.cat((text(2, 20), text(2, 20, seed + 5)), 1)
        got = go_on(model, ids, branch)
        if patched or family != "olmo_hybrid":
            assert_close(f"branch {seed}", got, full(model, ids)[:, 20:], LAYER)
    assert cache_contents.everything(cache) == before


@pytest.mark.parametrize("make", MAKE)
def test_one_cache_of_several_rows(family, make):
    hf_gdn.patch(strict=True)
    model = tiny.model(family)
    cache = filled(model, make=make)
    branch = caches.fork(cache, 3, rows=True)
    ids = torch.cat((text(2, 20).repeat_interleave(3, 0), text(6, 20, seed=1)), 1)
    assert_close("rows", go_on(model, ids, branch), full(model, ids)[:, 20:], LAYER)
    assert caches.snapshot(cache).batch_size == 2


def test_several_answers_to_one_prompt(family):
    model = tiny.model(family)
    ids = text(1, 20)
    kwargs = dict(max_new_tokens=6, num_return_sequences=3, do_sample=True, pad_token_id=0)
    torch.manual_seed(0)
    wanted = model.generate(ids, **kwargs)
    cache = MAKE["dynamic"](model)
    logits(model, ids[:, :-1], cache)
    torch.manual_seed(0)
    got = model.generate(ids, **tiny.given(caches.fork(cache, 3, rows=True)), **kwargs)
    assert torch.equal(got, wanted)


# ------------------------------------------------------------------------------------------------------------- model


def test_fingerprints_tell_models_apart(family, tmp_path):
    model = tiny.model(family)
    mark = caches.fingerprint(model)
    assert mark == caches.fingerprint(tiny.model(family)) == caches.fingerprint(torch.compile(model))
    assert mark == caches.fingerprint(model.get_decoder())
    seen = {
        mark,
        caches.fingerprint(tiny.model(family, seed=1)),
        caches.fingerprint(tiny.model(family, rms_norm_eps=1e-3)),
    }
    seen.add(caches.fingerprint(tiny.model(family, dtype=torch.bfloat16)))
    lora = LoraConfig(target_modules=tiny.projections(model), r=2, init_lora_weights=False)
    seen.add(caches.fingerprint(get_peft_model(tiny.model(family), lora)))
    tuned = tiny.model(family)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 1e-3
    seen.add(caches.fingerprint(tuned))
    assert len(seen) == 6
    same = tiny.model(family, use_cache=False, bos_token_id=5)  # nothing that a cache depends on
    assert caches.fingerprint(same) == mark
    model.save_pretrained(tmp_path)
    assert caches.fingerprint(type(model).from_pretrained(tmp_path)) == mark


def test_layers_go_where_they_run(family):
    """With weights that accelerate keeps elsewhere, whose parameters are on no device."""
    model = tiny.model(family)
    layers = model.config.get_text_config().num_hidden_layers
    assert layer_devices(model, layers) == [torch.device("cpu")] * layers
    accelerate.cpu_offload(model, execution_device="cpu")
    assert layer_devices(model, layers) == [torch.device("cpu")] * layers
    cache = MAKE["dynamic"](model)
    snapshot = caches.snapshot(filled(model), model)
    caches.restore(cache, snapshot, model)
    ids = text()
    assert_close("logits", logits(model, ids[:, 20:], cache), full(model, ids)[:, 20:], LAYER)


@pytest.mark.gpu
def test_between_devices(family, tmp_path):
    hf_gdn.patch()
    model = tiny.model(family).cuda()
    ids = text().cuda()
    for make in MAKE:
        cache = MAKE[make](model)
        logits(model, ids[:, :20], cache)
        caches.save(caches.snapshot(cache, model), tmp_path / "file")
        wanted = go_on(model, ids, cache)
        for found in (caches.load(tmp_path / "file", model), caches.load(tmp_path / "file", model, "cuda")):
            for back in (cache, MAKE[make](model)):
                caches.restore(back, found, model)
                assert torch.equal(go_on(model, ids, back), wanted)
    prefixes = caches.PrefixCache(model, every=8, device="cpu")
    for _ in range(2):
        cache = prefixes.prefill(ids[:1])
        assert {tensor.device.type for tensor in cache_contents.tensors(cache).values()} == {"cuda"}
    assert prefixes.tokens_reused == 39


def test_another_model_is_refused():
    model, other = tiny.model("qwen3_next"), tiny.model("qwen3_next", seed=1)
    cache = filled(other)
    before = cache_contents.everything(cache)
    snapshot = caches.snapshot(filled(model), model)
    with pytest.raises(SnapshotError, match="another model: it is of a qwen3_next model with other weights"):
        caches.restore(cache, snapshot, other)
    with pytest.raises(SnapshotError, match="with another config"):
        caches.restore(cache, snapshot, tiny.model("qwen3_next", rms_norm_eps=1e-3))
    with pytest.raises(SnapshotError, match="it is of a qwen3_next model, this is a qwen3_5_text model"):
        caches.restore(cache, snapshot, tiny.model("qwen3_5"))
    with pytest.raises(SnapshotError, match="does not name its model"):
        caches.restore(cache, caches.snapshot(filled(other)), other)
    assert cache_contents.everything(cache) == before
    caches.restore(cache, snapshot, caches.fingerprint(model))


# --------------------------------------------------------------------------------------------------------- bad input

_TYPES = ["linear_attention"] * 3 + ["full_attention"]
REFUSED = {
    "batch size": (dict(rows=3), {}, "holds 2 sequences, the snapshot 3"),
    "fewer layers": ({}, dict(num_hidden_layers=8, layer_types=_TYPES * 2), "layers 6 linear, 2 attention, the"),
    "layers in other order": ({}, dict(layer_types=_TYPES[::-1]), "kinds or order differ"),
    "heads": ({}, dict(linear_num_value_heads=8), r"conv\.0: the cache holds"),
    "window": ({}, dict(linear_conv_kernel_dim=3), r"conv\.0: the cache holds"),
    "attention heads": ({}, dict(num_key_value_heads=2), "keys: the cache holds"),
    "attention dimension": ({}, dict(head_dim=32), "keys: the cache holds"),
    "dtype": ({}, dict(dtype=torch.bfloat16), "bfloat16"),
}


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_changes(what, make):
    size, changes, says = REFUSED[what]
    model = tiny.model("qwen3_next")
    snapshot = caches.snapshot(filled(model, **size))
    cache = filled(tiny.model("qwen3_next", **changes), make=make)
    before = cache_contents.everything(cache)
    with pytest.raises(SnapshotError, match=says):
        caches.restore(cache, snapshot)
    assert cache_contents.everything(cache) == before


@pytest.mark.parametrize("used", [False, True])
def test_more_tokens_than_a_static_cache_has_room_for(family, used):
    model = tiny.model(family)
    snapshot = caches.snapshot(filled(model, tokens=17))
    cache = StaticCache(config=model.config, max_cache_len=16)
    if used:
        logits(model, text(2, 5), cache)
    before = cache_contents.everything(cache)
    with pytest.raises(SnapshotError, match="room for 16 tokens, the snapshot 17"):
        caches.restore(cache, snapshot)
    assert cache_contents.everything(cache) == before


def test_memory_that_runs_out_changes_nothing(family, monkeypatch):
    """Half-way through the layers, into a fresh cache and into one in use."""
    model = tiny.model(family)
    snapshot = caches.snapshot(filled(model))
    last = model.config.get_text_config().num_hidden_layers - 1
    for cache in (MAKE["dynamic"](model), MAKE["static"](model), filled(model, tokens=9), filled(model, make="static")):
        before = cache_contents.everything(cache)

        def exhausted(*_, **__):
            raise torch.OutOfMemoryError("no more")

        with monkeypatch.context() as patch:
            patch.setattr(type(cache.layers[last]), "lazy_initialization", exhausted)
            if cache.layers[last].is_initialized and isinstance(cache, StaticCache):
                continue  # asks for none
            with pytest.raises(torch.OutOfMemoryError):
                caches.restore(cache, snapshot)
        assert cache_contents.everything(cache) == before


def test_caches_that_have_no_snapshots():
    model = tiny.model("qwen3_next")
    snapshot = caches.snapshot(filled(model))
    other = DynamicCache(config=model.config)
    other.layers[0] = LinearAttentionAndFullAttentionLayer()
    text = "layer 0: snapshots do not support a LinearAttentionAndFullAttentionLayer; .*StaticLayer"
    with pytest.raises(SnapshotError, match=text):
        caches.snapshot(other)
    with pytest.raises(SnapshotError, match=text):
        caches.fork(other, 2)
    offloading = filled(model)
    offloading.offloading = True
    with pytest.raises(SnapshotError, match="offloading"):
        caches.snapshot(offloading)
    with pytest.raises(SnapshotError, match="layers none, the snapshot 3 linear, 1 attention"):
        caches.restore(DynamicCache(), snapshot)
    for wrong in (None, [], torch.zeros(1)):
        with pytest.raises(TypeError, match="expected a transformers cache"):
            caches.snapshot(wrong)
    with pytest.raises(TypeError, match="load\\(path\\)"):
        caches.restore(filled(model), "file.safetensors")
    for n in (0, -1):
        with pytest.raises(ValueError, match="n ≥ 1"):
            caches.fork(filled(model), n)


def test_layers_that_disagree_are_no_snapshot():
    """A forward that was cut off between two layers of keys."""
    model = tiny.model("qwen3_next", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    cache = filled(model)
    cache.layers[1].crop(-1)
    with pytest.raises(SnapshotError, match=r"layer 1 \(attention\): keys is .* for 2 sequences of 20 tokens"):
        caches.snapshot(cache)
