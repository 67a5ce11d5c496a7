"""What continuous batching cannot do is refused in a sentence, and other requests do not notice."""

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import hf_gdn
from hf_gdn import registry
from hf_gdn.errors import BatchingError, PatchError
from hf_gdn.kernels import slots as in_slots
from hf_gdn.patches import batching
from hf_gdn.upstream import paged
from tests import tiny_models as tiny
from tests.serving import runs

NAME = "qwen3_next"


def test_a_version_without_the_seams_is_named(monkeypatch):
    hf_gdn.patch()
    if paged.missing() is None:
        monkeypatch.setattr(paged, "missing", lambda: f"needs transformers >= {paged.FIRST}")
    with pytest.raises(BatchingError, match=f"transformers >= {paged.FIRST}"):
        tiny.model(NAME).generate_batch([[3, 4]], generation_config=runs.GREEDY)


@runs.needs_seams
def test_unpatching_takes_the_allocator_out():
    table = paged.allocators()
    assert paged.LINEAR not in table
    hf_gdn.patch(NAME)
    assert paged.LINEAR in table
    hf_gdn.unpatch()
    assert paged.LINEAR not in table
    with pytest.raises(ValueError, match="Invalid layer type: linear_attention"):
        tiny.model(NAME).generate_batch([[3, 4]], generation_config=runs.GREEDY)


@runs.needs_seams
def test_a_family_that_is_not_patched_is_refused():
    hf_gdn.patch("kimi_linear")
    with pytest.raises(BatchingError, match="qwen3_next is not patched"):
        tiny.model(NAME).generate_batch([[3, 4]], generation_config=runs.GREEDY)


@runs.needs_seams
def test_a_layer_with_a_forward_of_its_own_is_refused():
    hf_gdn.patch()
    model = tiny.model(NAME)
    tiny.mixer(model).forward = lambda *args, **kwargs: None
    with pytest.raises(BatchingError, match=r"layers\.0\.linear_attn runs .* instead of hf_gdn's forward"):
        model.generate_batch([[3, 4]], generation_config=runs.GREEDY)


@runs.needs_seams
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_cuda_graph=True), "expected use_cuda_graph=None or False, got True"),
        (dict(use_cuda_graph=(False, True)), "expected use_cuda_graph=None or False, got True"),
        (dict(use_async_batching=True), "expected use_async_batching=None or False, got True"),
    ],
)
def test_settings_that_cannot_be_served(changes, message):
    hf_gdn.patch()
    settings = runs.settings(**changes)
    with pytest.raises(BatchingError, match=message):
        tiny.model(NAME).generate_batch([[3, 4]], generation_config=runs.GREEDY, continuous_batching_config=settings)
    assert settings.use_async_batching == changes.get("use_async_batching")  # the caller's object is as it was


@runs.needs_seams
def test_a_model_in_several_processes_is_refused(monkeypatch):
    hf_gdn.patch()
    monkeypatch.setattr(paged, "tensor_parallel_size", lambda model: 2)
    with pytest.raises(BatchingError, match="the model is tensor-parallel"):
        tiny.model(NAME).generate_batch([[3, 4]], generation_config=runs.GREEDY)


@runs.needs_seams
@pytest.mark.parametrize("op", ["step_gdn", "prologue_gdn", "recurrent_gdn"])
def test_a_compiled_kernel_that_is_wrong_in_slots_is_refused(op, monkeypatch):
    """It is right without slots, so its other check lets it pass; and it is checked before anything runs."""
    monkeypatch.setenv("HF_GDN_VERIFY", "1")
    right = registry.get(op, "eager")

    def wrong(*args, slots=None, **kwargs):
        if slots is None:
            return right.fn(*args, **kwargs)
        kernel = dataclasses.replace(right, slots=False)
        moved = slots._replace(begun=torch.ones_like(slots.begun))  # reads what others left in a new request's slot
        if op.startswith("step"):
            return in_slots.step(kernel, *args, **kwargs, slots=moved)
        return (
            right.fn(*args, **kwargs, slots=moved)
            if op.startswith("prologue")
            else in_slots.delta_rule(kernel, *args, **kwargs, slots=moved)
        )

    hf_gdn.patch()
    made_before = tiny.model(NAME).init_continuous_batching(runs.GREEDY, runs.settings())
    registry.unregister(op, "eager")
    registry.register(dataclasses.replace(right, fn=wrong, checked=True, slots=True))
    try:
        hf_gdn.patch(backend="eager")
        with pytest.raises(BatchingError, match=f"{op} of backend 'eager' failed its check with states in slots"):
            made_before.start()
        with pytest.raises(BatchingError, match=f"{op} of backend 'eager' failed its check with states in slots"):
            tiny.model(NAME).generate_batch([[3, 4]], generation_config=runs.GREEDY)
    finally:
        registry.unregister(op, "eager")
        registry.register(right)


@runs.needs_seams
def test_states_of_an_unknown_model():
    with pytest.raises(BatchingError, match="expected a model of one of the families .* got 'llama'"):
        batching.states_of(LlamaConfig())


@runs.needs_seams
def test_models_without_linear_attention_are_left_alone():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model, (prompt,) = LlamaForCausalLM(config).eval(), runs.prompts((9,))
    hf_gdn.patch()
    out = model.generate_batch([prompt], generation_config=runs.GREEDY, continuous_batching_config=runs.settings())
    assert out["req_0"].generated_tokens == runs.alone(model, prompt)


# ------------------------------------------------------------------------------------------------------- while it runs


@runs.needs_seams
def test_a_request_that_can_never_fit_fails_alone():
    model, (long, short) = tiny.model(NAME), runs.prompts((1200, 6))
    hf_gdn.patch()
    with runs.manager(model, num_blocks=14) as made:
        ids = [made.add_request(short), made.add_request(long), made.add_request(short, max_new_tokens=2000)]
        ids.append(made.add_request(short))
        out = runs.results(made, ids)
        cache = runs.cache_of(made)
    for request, tokens in ((ids[1], "1200 prompt tokens and up to 12"), (ids[2], "6 prompt tokens and up to 2000")):
        assert f"expected a request that fits in the cache, got {tokens}" in out[request].error
    for request in (ids[0], ids[3]):
        assert out[request].generated_tokens == runs.alone(model, short)
    runs.assert_nothing_held(cache)


@runs.needs_seams
def test_an_empty_prompt_fails_alone():
    model, (prompt,) = tiny.model(NAME), runs.prompts((6,))
    hf_gdn.patch()
    with runs.manager(model) as made:
        ids = [made.add_request([]), made.add_request(prompt), made.add_request([])]
        out = runs.results(made, ids)
    for empty in (ids[0], ids[2]):
        assert out[empty].error == "expected a prompt of at least one token, got an empty one"
        assert out[empty].generated_tokens == []
    assert out[ids[1]].generated_tokens == runs.alone(model, prompt)


@runs.needs_seams
def test_a_request_id_in_use_fails_alone():
    model, (first, second, third) = tiny.model(NAME), runs.prompts((27, 60, 3))
    hf_gdn.patch()
    with runs.manager(model) as made:
        with made.pause():  # so that all of them wait
            made.add_request(first, request_id="a")
            made.add_request(second, request_id="a")
            made.add_request(third, request_id="b")
        out = [made.get_result(timeout=30) for _ in range(3)]
        again = made.add_request(second, request_id="a")
        out.append(runs.results(made, [again])[again])
    (refused,) = (made for made in out if made.error)
    assert "expected a request_id that is not in use, got 'a'" in refused.error and refused.prompt_ids == second
    for made in out:
        assert made is refused or made.generated_tokens == runs.alone(model, made.prompt_ids)


@runs.needs_seams
def test_a_request_without_a_limit_ends_where_the_cache_does(caplog):
    model, prompts = tiny.model(NAME), runs.prompts((30, 31))
    hf_gdn.patch()
    unlimited = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with runs.manager(model, unlimited, num_blocks=8) as made:
        ids = [made.add_request(prompts[0]), made.add_request(prompts[1], max_new_tokens=60)]
        out = runs.results(made, ids)
        cache = runs.cache_of(made)
    for request in ids:
        runs.assert_greedy(model, out[request])
    assert len(out[ids[1]].generated_tokens) == 60
    tokens = 30 + len(out[ids[0]].generated_tokens) - 1
    # Every sector but that of its states is full.
    blocks = cache.cache_allocators["full_attention"].blocks_per_sector * (cache.num_sectors - 1)
    assert tokens == 16 * blocks
    assert "requests without max_new_tokens end at the latest where they fill the cache" in caplog.text
    runs.assert_nothing_held(cache)


@runs.needs_seams
def test_a_pool_too_small_for_any_request():
    hf_gdn.patch()
    out = tiny.model(NAME).generate_batch(
        [[3, 4]], generation_config=runs.GREEDY, continuous_batching_config=runs.settings(num_blocks=1)
    )
    assert "expected a request that fits in the cache" in out["req_0"].error


@runs.needs_seams
def test_an_unknown_sampling_option_fails_alone():
    model, (prompt,) = tiny.model(NAME), runs.prompts((6,))
    hf_gdn.patch()
    with runs.manager(model, per_request_processors=True) as made:
        ids = [made.add_request(prompt, heat=2.0), made.add_request(prompt)]
        out = runs.results(made, ids)
    assert "heat" in out[ids[0]].error
    assert out[ids[1]].generated_tokens == runs.alone(model, prompt)


@runs.needs_seams
def test_unpatching_while_a_manager_runs_is_refused_and_changes_nothing():
    model, (prompt,) = tiny.model(NAME), runs.prompts((6,))
    hf_gdn.patch()
    with runs.manager(model) as made:
        ids = [made.add_request(prompt, max_new_tokens=100, eos_token_id=-1)]
        with pytest.raises(PatchError, match=r"qwen3_next: a manager of continuous batching runs .* call its stop\(\)"):
            hf_gdn.unpatch()
        with pytest.raises(PatchError, match="a manager of continuous batching runs"), hf_gdn.unpatched():
            pass
        hf_gdn.unpatch("olmo_hybrid")  # no model of it runs
        assert hf_gdn.status().active
        assert len(runs.results(made, ids)[ids[0]].generated_tokens) == 100
    hf_gdn.unpatch()
    assert not hf_gdn.status().active


@runs.needs_seams
def test_other_patches_while_a_manager_runs_are_refused():
    model, (prompt,) = tiny.model(NAME), runs.prompts((6,))
    hf_gdn.patch()
    layer = batching.class_attribute(type(tiny.mixer(model)), "forward")
    with runs.manager(model) as made:
        with pytest.raises(PatchError, match=r"qwen3_next: a manager of continuous batching runs .* call its stop\(\)"):
            hf_gdn.patch(backend="eager")
        hf_gdn.patch()  # as it is
        assert batching.class_attribute(type(tiny.mixer(model)), "forward") is layer
        name = made.add_request(prompt)
        runs.assert_greedy(model, runs.results(made, [name])[name])
    hf_gdn.patch(backend="eager")


@runs.needs_seams
@pytest.mark.parametrize(
    ("families", "message"),
    [(NAME, "qwen3_next is not patched"), (None, "Invalid layer type: linear_attention")],
    ids=["one family", "all"],
)
def test_a_kept_manager_does_not_outlive_its_patch(families, message):
    model, (prompt,) = tiny.model(NAME), runs.prompts((6,))
    hf_gdn.patch()
    kept = dict(
        generation_config=runs.GREEDY, continuous_batching_config=runs.settings(), persistent_manager=True
    )  # fmt: skip
    other = model.init_continuous_batching(runs.GREEDY, runs.settings())
    for _ in range(2):
        (out,) = model.generate_batch([prompt], **kept).values()
        runs.assert_greedy(model, out)
    hf_gdn.unpatch(families)
    with pytest.raises(ValueError, match=message):
        model.generate_batch([prompt], **kept)
    if families is not None:
        with pytest.raises(BatchingError, match=message):
            other.start()
    hf_gdn.patch()
    (out,) = model.generate_batch([prompt], **kept).values()
    runs.assert_greedy(model, out)


def test_a_benchmark_of_one_request_is_refused_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serving.py", "--model", "qwen3_next-tiny", "--requests", "1"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(Path(hf_gdn.__file__).parents[1] / "benchmarks" / "serving.py"), run_name="__main__")
    assert "expected at least two --requests" in capsys.readouterr().err


def test_the_version_that_first_serves():
    served = paged.missing() is None
    assert served == (transformers.__version__ >= paged.FIRST)
