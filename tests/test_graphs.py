"""generate() from CUDA graphs: the same tokens as without, captured once, freed when nobody needs them.

On a CPU `tests.fake_cuda_graph.Tape` takes the place of a CUDA graph: a tape of operators that knows only addresses and
fails where a capture would. Tests marked `gpu` have the real one.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import CompileConfig, PreTrainedModel, StaticCache

import hf_gdn
from hf_gdn import cuda_graphs, log
from hf_gdn.cuda_graphs import cache_state
from hf_gdn.upstream import cache_names
from tests import tiny_models as tiny
from tests.fake_cuda_graph import Tape

# The stand-in replays torch's operators, which numba's kernels are not.
pytestmark = pytest.mark.usefixtures("without_numba")

NEW = 10  # tokens; the first is the prefill's, the second runs as ever, the others are replays


@pytest.fixture
def taped(monkeypatch):
    """CPU models have graphs: tapes."""
    for name, value in {"recorded": 0, "replayed": 0, "free": 1 << 40, "raises": None, "waits": 0}.items():
        monkeypatch.setattr(Tape, name, value)
    monkeypatch.setitem(cuda_graphs.CAPTURES, "cpu", Tape)
    monkeypatch.setattr(log, "warned", set())
    yield
    cuda_graphs.release()


def build(family: str = "qwen3_next", **kwargs):
    model = tiny.model(family, **kwargs)
    model.set_experts_implementation("batched_mm")  # as generate() does on a GPU
    return model


def everywhere() -> CompileConfig:
    config = CompileConfig()
    config._compile_all_devices = True  # transformers asks for the decode callable on CUDA alone
    return config


def generate(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    if cache_names.look(kwargs) is None:
        kwargs["cache_implementation"] = "static"
    if not kwargs.get("disable_compile"):
        kwargs["compile_config"] = everywhere()
    return model.generate(
        ids, attention_mask=mask, **{"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **kwargs}
    )


def ungraphed(model, *args, **kwargs):
    with hf_gdn.patched():
        return generate(model, *args, disable_compile=True, **kwargs)


def counts() -> tuple[int, int]:
    return Tape.recorded, Tape.replayed


def graphs_of(model) -> list:
    known = cuda_graphs.known_graphs(model)
    return [] if known is None else known.steps


def check_reads(model) -> None:
    """A graph reads its own buffers, the cache and the model's tensors, and nothing else that was there before."""
    for graph in graphs_of(model):
        allowed = [*graph.inputs, *model.parameters(), *model.buffers()]
        allowed += [value for part in graph.held for value in part.values() if isinstance(value, torch.Tensor)]
        places = {x.untyped_storage().data_ptr() for x in allowed}
        others = [tuple(x.shape) for place, x in graph.capture.outer.items() if place not in places]
        assert not others, f"a graph reads other tensors, of shapes {others}"


def warnings(caplog) -> list[str]:
    return [message for message in caplog.messages if "without a CUDA graph" in message]


# ------------------------------------------------------------------------------------------------- the same tokens


def test_left_padded_batches_of_every_family(family, taped):
    tiny.skip_what_it_cannot(family, "CUDA graphs")
    model = build(family)
    ids, mask = tiny.batch()
    wanted = ungraphed(model, ids, mask)
    hf_gdn.patch(cuda_graphs=True)
    assert torch.equal(generate(model, ids, mask), wanted)
    assert counts() == (1, NEW - 2)
    assert torch.equal(generate(model, ids, mask), wanted)
    assert counts() == (1, NEW - 2 + NEW - 1), "captured again for a cache of the same layout"
    check_reads(model)


def test_another_batch_size_and_a_longer_prompt(taped):
    model = build()
    ids, mask = tiny.batch(rows=4, length=40)
    wanted = [ungraphed(model, ids[:rows, -length:], mask[:rows, -length:]) for rows, length in ((4, 20), (1, 20))]
    wanted += [ungraphed(model, ids, mask), ungraphed(model, ids[:, -20:], mask[:, -20:])]
    del model._previous_max_cache_length
    hf_gdn.patch(cuda_graphs=True)
    assert torch.equal(generate(model, ids[:, -20:], mask[:, -20:]), wanted[0])
    assert torch.equal(generate(model, ids[:1, -20:], mask[:1, -20:]), wanted[1])
    assert torch.equal(generate(model, ids, mask), wanted[2])
    assert counts()[0] == 3
    assert torch.equal(generate(model, ids[:, -20:], mask[:, -20:]), wanted[3])  # in a cache as long as the last
    assert counts()[0] == 3
    check_reads(model)


def test_sampling(taped):
    model = build("kimi_linear")
    ids, mask = tiny.batch()
    sampled = dict(do_sample=True, temperature=2.0, top_k=50, num_return_sequences=2)
    torch.manual_seed(1)
    wanted = ungraphed(model, ids, mask, **sampled)
    hf_gdn.patch(cuda_graphs=True)
    torch.manual_seed(1)
    assert torch.equal(generate(model, ids, mask, **sampled), wanted)
    assert counts() == (1, NEW - 2)


def test_rows_stop_at_eos(taped):
    model = build()
    ids, mask = tiny.batch()
    free = ungraphed(model, ids, mask)[:, ids.shape[1] :]
    stop = dict(eos_token_id=[free[0, 3].item(), free[1, 6].item()], min_new_tokens=1, pad_token_id=0)
    wanted = ungraphed(model, ids, mask, **stop)
    hf_gdn.patch(cuda_graphs=True)
    assert torch.equal(generate(model, ids, mask, **stop), wanted)
    assert counts()[1] > 0


def test_several_models_at_once(taped):
    models = [build(), build(seed=1), build("olmo_hybrid")]
    ids, mask = tiny.batch()
    wanted = [ungraphed(model, ids, mask) for model in models]
    hf_gdn.patch(cuda_graphs=True)
    for _ in range(2):
        for model, tokens in zip(models, wanted):
            assert torch.equal(generate(model, ids, mask), tokens)
    assert counts()[0] == len(models)


def test_two_caches_of_one_model_in_turns(taped):
    model = build()
    ids, _ = tiny.batch(rows=2, length=12)
    hf_gdn.patch(cuda_graphs=True)

    def steps(decode):
        caches = [StaticCache(config=model.config, max_cache_len=24) for _ in ids]
        found = []
        with torch.no_grad():
            for at in range(6):
                for row, cache in zip(ids[:, :, None], caches):
                    piece = row[:4].T if at == 0 else row[3 + at : 4 + at].T
                    positions = torch.arange(4)[None] if at == 0 else torch.tensor([[3 + at]])
                    run = model if at == 0 else decode
                    out = run(input_ids=piece, position_ids=positions, **tiny.given(cache), return_dict=True)
                    found.append(out.logits[:, -1:])
                    assert tiny.cache_of(out) is cache
        return found

    wanted = [logits.clone() for logits in steps(model)]
    found = steps(model.get_compiled_call(None))
    assert counts()[0] == 2
    assert all(torch.equal(a, b) for a, b in zip(found, wanted)), "a replay wrote to what an earlier one had given"


def test_a_cache_of_the_users(taped):
    """Reset, it is replayed in the same graph; nothing of it is taken over when it is gone."""
    model = build()
    ids, mask = tiny.batch()
    wanted = ungraphed(model, ids, mask)
    hf_gdn.patch(cuda_graphs=True)
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + NEW)
    for turn in range(2):
        assert torch.equal(generate(model, ids, mask, **tiny.given(cache)), wanted)
        assert counts() == (1, (turn + 1) * (NEW - 1) - 1)
        cache.reset()
    held = cache.layers[0].recurrent_states[0]
    before = held.clone()
    del cache
    assert not graphs_of(model)
    assert torch.equal(generate(model, ids, mask), wanted)
    assert torch.equal(held, before)


def test_a_returned_cache_is_the_callers(taped):
    model = build()
    ids, mask = tiny.batch()
    hf_gdn.patch(cuda_graphs=True)
    first = generate(model, ids, mask, return_dict_in_generate=True, output_logits=True)
    state, logits = tiny.cache_of(first).layers[0].recurrent_states[0], [x.clone() for x in first.logits]
    before = state.clone()
    generate(model, ids.flip(1), mask.flip(1) * 0 + 1)
    assert torch.equal(state, before)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, logits))
    assert counts()[0] == 2
    first = generate(model, ids, mask, return_dict_in_generate=True)
    layers = tiny.cache_of(first).layers  # without the cache
    before = layers[0].recurrent_states[0].clone()
    del first, state
    generate(model, ids.flip(1))
    assert torch.equal(layers[0].recurrent_states[0], before)


def test_inside_inference_mode_and_outside(taped):
    model = build()
    ids, mask = tiny.batch()
    wanted = ungraphed(model, ids, mask)
    hf_gdn.patch(cuda_graphs=True)
    with torch.inference_mode():
        assert torch.equal(generate(model, ids, mask), wanted)
    assert torch.equal(generate(model, ids, mask), wanted)
    assert counts()[1] == 2 * (NEW - 2)


def test_chunked_prefill(taped):
    model = build()
    ids, _ = tiny.batch(rows=1, length=24)
    wanted = ungraphed(model, ids)
    hf_gdn.patch(cuda_graphs=True)
    assert torch.equal(generate(model, ids, prefill_chunk_size=8), wanted)
    assert counts() == (1, NEW - 2)


# ----------------------------------------------------------------------------------------------- what changes meanwhile


def replace_weights(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


def in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


def other_attention(model):
    model.set_attn_implementation("eager")


def move(model):
    model.double()


CHANGES = {change.__name__: change for change in (replace_weights, in_place, other_attention, move)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_captured_again(change, taped):
    model = build()
    ids, mask = tiny.batch()
    hf_gdn.patch(cuda_graphs=True)
    generate(model, ids, mask)
    CHANGES[change](model)
    wanted = ungraphed(copy.deepcopy(model), ids, mask)
    hf_gdn.patch(cuda_graphs=True)
    assert torch.equal(generate(model, ids, mask), wanted)
    assert counts()[0] == (1 if change == "in_place" else 2)


def test_what_counts_as_a_change_of_a_model():
    model = build()
    looks = [cuda_graphs.model_state(model)[0], cuda_graphs.model_state(model)[0]]
    assert looks[0] == looks[1]
    model.config.something = 1
    looks.append(cuda_graphs.model_state(model)[0])
    model.model.layers[1].flags = {"adapters": ["one"]}
    looks.append(cuda_graphs.model_state(model)[0])
    model.model.layers[1].flags["adapters"].append("two")
    looks.append(cuda_graphs.model_state(model)[0])
    model.model.layers[1].offset = torch.zeros(1)
    looks.append(cuda_graphs.model_state(model)[0])
    assert len(set(looks)) == 5


def test_another_backend_is_captured_again(taped):
    model = build()
    ids, mask = tiny.batch()
    hf_gdn.patch(cuda_graphs=True)
    generate(model, ids, mask)
    for other in (hf_gdn.unpatched, hf_gdn.patched):
        with other():
            pass
        generate(model, ids, mask)
        assert counts()[0] == 1
    hf_gdn.patch(cuda_graphs=True, backend="eager")
    generate(model, ids, mask)
    assert counts()[0] == 2


@pytest.mark.parametrize("what", ["tensor", "flag"])
def test_a_cache_that_changed_is_not_replayed(what, taped):
    model = build()
    ids, _ = tiny.batch(rows=1, length=12)
    hf_gdn.patch(cuda_graphs=True)

    def steps(decode):
        cache, found = StaticCache(config=model.config, max_cache_len=24), []
        with torch.no_grad():
            model(input_ids=ids[:, :4], **tiny.given(cache))
            for at in range(4, 10):
                if at == 7 and what == "tensor":
                    cache.reorder_cache(torch.tensor([0]))
                elif at == 7:
                    cache.layers[0].has_previous_state[0] = False
                positions = torch.tensor([[at]])
                found.append(decode(input_ids=ids[:, at : at + 1], position_ids=positions, **tiny.given(cache)).logits)
        return torch.cat(found, 1)

    wanted = steps(model)
    assert torch.equal(steps(model.get_compiled_call(None)), wanted)
    assert counts() == ((2, 5) if what == "tensor" else (1, 4))  # the flag is as before after one step as ever


# --------------------------------------------------------------------------------------------------------------- memory


def test_memory_is_freed(taped, monkeypatch):
    """One graph waits for the next cache, as long as there is room, and no cache is kept."""
    model = build()
    ids, mask = tiny.batch()
    hf_gdn.patch(cuda_graphs=True)
    result = generate(model, ids, mask, return_dict_in_generate=True)
    cache, (graph,) = weakref.ref(tiny.cache_of(result)), map(weakref.ref, graphs_of(model))
    state = weakref.ref(tiny.cache_of(result).layers[0].recurrent_states[0])
    del result
    gc.collect()
    assert cache() is None and graph() is not None and state() is not None

    class Late(Tape):
        def __init__(self, function, device):
            assert graph() is None and state() is None, "the graph of another batch size has been kept"
            super().__init__(function, device)

    monkeypatch.setitem(cuda_graphs.CAPTURES, "cpu", Late)
    generate(model, ids[:1], mask[:1])
    (graph,) = map(weakref.ref, graphs_of(model))
    Tape.free = 8 * graph().bytes - 1
    model.get_compiled_call(everywhere())
    assert graph() is None, "kept although memory is short"
    assert torch.equal(generate(model, ids, mask), ungraphed(model, ids, mask))


@pytest.mark.parametrize("how", ["model dies", "unpatch", "patch", "release", "block"])
def test_all_memory_is_freed(how, taped):
    model = build()
    ids, mask = tiny.batch()
    with hf_gdn.patched(cuda_graphs=True):
        if how != "block":
            hf_gdn.patch(cuda_graphs=True)
        generate(model, ids, mask)
        generate(model, ids, mask)
        (graph,) = map(weakref.ref, graphs_of(model))
        if how == "model dies":
            del model
            gc.collect()
        elif how == "unpatch":
            hf_gdn.unpatch()
        elif how == "patch":
            hf_gdn.patch()
        elif how == "release":
            cuda_graphs.release()
        if how != "block":
            assert graph() is None
    assert graph() is None


# ------------------------------------------------------------------------------------------------- what cannot be


class Strange:
    pass


def hooked(model):
    model.model.layers[1].register_forward_hook(lambda module, args, output: None)


def offloaded(model):
    add_hook_to_module(model.lm_head, ModelHook())


def training(model):
    model.train()


MODELS = {
    "has a forward hook": hooked,
    "has an accelerate hook": offloaded,
    "it is in training mode": training,
}
ARGUMENTS = {
    "output_attentions is set": dict(output_attentions=True, return_dict_in_generate=True),
    "output_hidden_states is set": dict(output_hidden_states=True, return_dict_in_generate=True),
}


@pytest.mark.parametrize("reason", [*MODELS, *ARGUMENTS])
def test_what_cannot_be_a_graph_runs_with_one_warning(reason, taped, caplog):
    model = build()
    if "attentions" in reason:
        model.set_attn_implementation("eager")
    ids, mask = tiny.batch()
    MODELS.get(reason, lambda model: None)(model)
    kwargs = ARGUMENTS.get(reason, {})
    wanted = ungraphed(model, ids, mask, **kwargs)
    hf_gdn.patch(cuda_graphs=True)
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        found = [generate(model, ids, mask, **kwargs) for _ in range(2)]
    for got in found:
        assert torch.equal(*(x.sequences if kwargs else x for x in (got, wanted)))
    assert counts() == (0, 0)
    assert len(warnings(caplog)) == 1 and reason in warnings(caplog)[0]
    if not kwargs:
        return
    assert torch.equal(generate(model, ids, mask), wanted.sequences)
    assert counts() == (1, NEW - 2), "one call's arguments have kept another from its graph"


def test_calls_that_cannot_be_a_graph(taped, caplog):
    model = build()
    ids, _ = tiny.batch(rows=1, length=5)
    hf_gdn.patch(cuda_graphs=True)
    decode = model.get_compiled_call(None)

    def step(**kwargs):
        cache = StaticCache(config=model.config, max_cache_len=8, offloading="offloading" in kwargs)
        model(input_ids=ids[:, :4], **tiny.given(cache))
        decode(input_ids=ids[:, 4:], position_ids=torch.tensor([[4]]), **tiny.given(cache), **kwargs)

    def without_cache():
        decode(input_ids=ids[:, :1])

    def dynamic():
        cache = tiny.cache_of(model(input_ids=ids[:, :4]))
        decode(input_ids=ids[:, 4:], **tiny.given(cache))

    def autocast():
        cache = StaticCache(config=model.config, max_cache_len=8)
        model(input_ids=ids[:, :4], **tiny.given(cache))
        with torch.autocast("cpu", torch.bfloat16), contextlib.suppress(ValueError):  # the cache's dtype is another
            decode(input_ids=ids[:, 4:], position_ids=torch.tensor([[4]]), **tiny.given(cache))

    cases = {
        "gradients are on": step,
        "it has no cache": torch.no_grad()(without_cache),
        "the cache is a DynamicCache": torch.no_grad()(dynamic),
        "autocast is on": torch.no_grad()(autocast),
        "one of its arguments is a Strange": torch.no_grad()(lambda: step(strange=Strange())),
    }
    for reason, call in cases.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_gdn"):
            call()
        assert len(warnings(caplog)) == 1 and reason in warnings(caplog)[0], reason
    assert counts() == (0, 0)


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nand more"), torch.OutOfMemoryError("full")])
def test_a_capture_that_fails_leaves_all_as_it_was(error, taped, caplog):
    model = build()
    ids, mask = tiny.batch()
    wanted = ungraphed(model, ids, mask)
    hf_gdn.patch(cuda_graphs=True)
    Tape.raises = error
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        assert torch.equal(generate(model, ids, mask), wanted)
        Tape.raises = None
        assert torch.equal(generate(model, ids, mask), wanted)
    assert counts() == (0, 0), "what failed once is not tried again"
    assert [message.rpartition(": ")[2] for message in warnings(caplog)] == [str(error).partition("\n")[0]]


def test_an_interrupted_capture_leaves_the_cache_as_it_was(taped):
    model = build()
    ids, _ = tiny.batch(rows=1, length=12)
    hf_gdn.patch(cuda_graphs=True)
    decode, cache = model.get_compiled_call(None), StaticCache(config=model.config, max_cache_len=24)
    again = StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        for run, own in ((decode, cache), (model, again)):
            model(input_ids=ids[:, :4], **tiny.given(own))
            run(input_ids=ids[:, 4:5], position_ids=torch.tensor([[4]]), **tiny.given(own))
        Tape.raises = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            decode(input_ids=ids[:, 5:6], position_ids=torch.tensor([[5]]), **tiny.given(cache))
        for part, other in zip(cache_state.attributes(cache), cache_state.attributes(again)):
            for name, value in part.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, other[name]), name
        Tape.raises = None
        got, wanted = (
            run(input_ids=ids[:, 5:6], position_ids=torch.tensor([[5]]), **tiny.given(own)).logits
            for run, own in ((decode, cache), (model, again))
        )
    assert torch.equal(got, wanted)
    assert counts() == (1, 1)


@pytest.mark.parametrize("what", ["counter", "tensor", "capture", "model", "inputs"])
def test_state_that_python_keeps_cannot_be_a_graph(what, taped, caplog, monkeypatch):
    model = build("kimi_linear")
    ids, mask = tiny.batch()
    wanted = ungraphed(model, ids, mask)
    layer = model.model.layers[0]
    original = type(layer).forward

    def forward(self, *args, **kwargs):
        cache = cache_names.look(kwargs).layers[0]
        if what == "counter":
            cache.seen = getattr(cache, "seen", 1000) + 1
        elif what == "tensor":
            cache.recurrent_states[0] = cache.recurrent_states[0].clone() if cache.has_previous_state[0] else None
        elif what == "capture" and Tape.recording:
            cache.recurrent_states[0] = cache.recurrent_states[0].clone()
        elif what == "model" and self is layer:
            self.seen = getattr(self, "seen", 0) + 1
        return original(self, *args, **kwargs)

    def prepare(self, *args, **kwargs):
        prepare.step += 1
        return {**prepared(self, *args, **kwargs), "unused": prepare.step}

    prepare.step, prepared = 0, type(model).prepare_inputs_for_generation
    if what == "inputs":
        monkeypatch.setattr(type(model), "prepare_inputs_for_generation", prepare)
        monkeypatch.setattr(type(model), "_validate_model_kwargs", lambda self, kwargs: None)
    else:
        monkeypatch.setattr(type(layer), "forward", forward)
    hf_gdn.patch(cuda_graphs=True)
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        assert torch.equal(generate(model, ids, mask), wanted)
    assert counts() == (int(what == "capture"), 0)
    reasons = {
        "counter": "its cache's 'seen' change",
        "tensor": "its cache's 0 change",
        "capture": "a step changes the cache's 0",
        "model": "a step changes attributes of the model",
        "inputs": "its inputs change from step to step",
    }
    assert len(warnings(caplog)) == 1 and reasons[what] in warnings(caplog)[0]


def test_caches_whose_tensors_are_replaced_every_step_are_not_captured_every_step(taped, caplog):
    model = build()
    ids, _ = tiny.batch(rows=1, length=24)
    hf_gdn.patch(cuda_graphs=True)
    decode, cache = model.get_compiled_call(None), StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "hf_gdn"):
        model(input_ids=ids[:, :4], **tiny.given(cache))
        for at in range(4, 20):
            decode(input_ids=ids[:, at : at + 1], position_ids=torch.tensor([[at]]), **tiny.given(cache))
            cache.reorder_cache(torch.tensor([0]))
    assert counts()[0] < 4
    assert "its cache's tensors change from step to step" in warnings(caplog)[0]


@pytest.mark.parametrize("waits", [1, 2])
def test_a_step_that_waits_for_the_device_twice_is_never_captured(taped, caplog, waits):
    """Once may be because it was the first: a capture that fails can break PyTorch's allocator."""
    model = build()
    ids, _ = tiny.batch(2, 5)
    wanted = ungraphed(model, ids)
    hf_gdn.patch(cuda_graphs=True)
    Tape.waits = waits
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        assert torch.equal(generate(model, ids), wanted)
    if waits == 1:
        assert counts() == (1, NEW - 3) and not warnings(caplog)
    else:
        assert counts() == (0, 0)
        assert "a step waits for the device (model.py:7)" in warnings(caplog)[0]


def test_several_devices(taped):
    model = build()
    model.model.norm.to("meta")
    assert "on several devices: cpu, meta" in cuda_graphs.model_state(model)[1]


# ------------------------------------------------------------------------------------------------------------ patching


def test_status_and_undoing():
    original = PreTrainedModel.get_compiled_call
    assert "CUDA graphs" not in str(hf_gdn.patch())
    assert PreTrainedModel.get_compiled_call is original
    status = hf_gdn.patch(["qwen3_next", "kimi_linear"], cuda_graphs=True)
    assert [row.name for row in status.families if row.cuda_graphs] == ["kimi_linear", "qwen3_next"]
    assert str(status).count("patched, CUDA graphs") == 2
    replacement = PreTrainedModel.get_compiled_call
    assert replacement is not original
    hf_gdn.patch("qwen3_next")
    assert PreTrainedModel.get_compiled_call is replacement
    with hf_gdn.unpatched():
        assert PreTrainedModel.get_compiled_call is original
    assert PreTrainedModel.get_compiled_call is replacement
    hf_gdn.unpatch("kimi_linear")
    assert PreTrainedModel.get_compiled_call is original


def test_other_models_and_devices_compile_as_ever(taped, monkeypatch):
    asked = []
    monkeypatch.setattr(PreTrainedModel, "get_compiled_call", lambda self, config: asked.append(config))
    hf_gdn.patch("kimi_linear", cuda_graphs=True)
    build().get_compiled_call("one")
    model = build("kimi_linear")
    assert isinstance(model.get_compiled_call("two"), cuda_graphs.DecodeSession)
    monkeypatch.delitem(cuda_graphs.CAPTURES, "cpu")
    model.get_compiled_call("three")
    assert asked == ["one", "three"]
    hf_gdn.unpatch()


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_on_a_gpu(family, dtype, caplog, monkeypatch):
    """Tokens are the un-graphed path's, bit for bit: the same kernels run on the same numbers."""
    tiny.skip_what_it_cannot(family, "CUDA graphs")
    monkeypatch.setattr(log, "warned", set())
    made = []
    real = cuda_graphs.CudaCapture.replay
    monkeypatch.setattr(cuda_graphs.CudaCapture, "replay", lambda self: (made.append(1), real(self))[1])
    model = tiny.model(family, dtype=dtype).cuda()
    ids, mask = (x.cuda() for x in tiny.batch())
    calls = [(ids, mask), (ids[:1, -20:], None), (ids, mask), (ids.repeat(1, 2), mask.repeat(1, 2)), (ids, mask)]
    wanted = [ungraphed(model, *call) for call in calls]
    hf_gdn.patch(cuda_graphs=True)
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        for call, tokens in zip(calls, wanted):
            assert torch.equal(generate(model, *call), tokens)
    assert not warnings(caplog)
    assert len(made) >= len(calls) * (NEW - 2)


@pytest.mark.gpu
def test_memory_on_a_gpu():
    model = build().cuda()
    ids, mask = (x.cuda() for x in tiny.batch())
    ungraphed(model, ids, mask)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    hf_gdn.patch(cuda_graphs=True)
    for rows in (1, 2, 3, 1):
        generate(model, ids[:rows], mask[:rows])
    assert torch.cuda.memory_allocated() > before
    hf_gdn.unpatch()
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before  # less by the matrix library's workspace


@pytest.mark.gpu
def test_a_capture_that_fails_on_a_gpu(caplog, monkeypatch):
    """A step that waits for the device cannot be captured; the device and its memory serve on."""
    monkeypatch.setattr(log, "warned", set())
    model = build().cuda()
    layer = model.model.layers[0].mlp
    ids, mask = (x.cuda() for x in tiny.batch())
    wanted = ungraphed(model, ids, mask)
    original = type(layer).forward

    def forward(self, x):
        x.sum().item()
        return original(self, x)

    monkeypatch.setattr(type(layer), "forward", forward)
    hf_gdn.patch(cuda_graphs=True)
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        assert torch.equal(generate(model, ids, mask), wanted)
    assert len(warnings(caplog)) == 1
    assert not torch.cuda.is_current_stream_capturing()
    monkeypatch.undo()
    assert torch.equal(generate(model, ids, mask), wanted), "after a failed capture nothing can be captured"


class Patterned(nn.Module):
    """A function of its own input, to try a capture alone."""

    def forward(self, x):
        return torch.linalg.vector_norm(x @ x.T, dim=1) + 1


@pytest.mark.gpu
def test_the_capture_alone():
    x = torch.randn(8, 8, device="cuda")
    module = Patterned()
    module(x)
    capture = cuda_graphs.CudaCapture(lambda: module(x), x.device)
    for seed in range(3):
        x.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)))
        capture.replay()
        assert torch.equal(capture.outputs, module(x))
    assert cuda_graphs.CudaCapture.room(x.device) > 0
