"""`hf-gdn kernels`: the plan and its errors."""

import dataclasses
import re

import pytest
import torch

from hf_gdn import registry
from hf_gdn.errors import UserError
from hf_gdn.eval import kernel_cases
from hf_gdn.eval.options import KernelBenchOptions
from hf_gdn.loading import models
from hf_gdn.loading.options import DeviceOptions
from hf_gdn.loading.shapes import SHAPES
from tests import tiny_models as tiny
from tests.eval.planted import TINY, backend

WHERE = DeviceOptions(device="cpu")


@pytest.fixture
def cuda(monkeypatch):
    """A plan for a CUDA device that is not there."""
    monkeypatch.setattr(models, "pick_device", lambda name: torch.device("cuda"))


def test_default_plan_of_a_cpu():
    found = kernel_cases.plan(KernelBenchOptions(), WHERE)
    calls = [(c.op, c.shape, c.batch, c.tokens) for c in found if c.backend == "eager"]
    qwen, kimi = "qwen3_next-80b", "kimi_linear-48b"
    assert calls == [
        ("chunk_gdn", qwen, 1, 512),
        ("chunk_gdn", qwen, 1, 2048),
        ("recurrent_gdn", qwen, 1, 1),
        ("recurrent_gdn", qwen, 4, 1),
        ("chunk_kda", kimi, 1, 128),
        ("chunk_kda", kimi, 1, 512),
        ("recurrent_kda", kimi, 1, 1),
        ("recurrent_kda", kimi, 4, 1),
    ]
    assert {c.backend for c in found} == {"transformers", *tiny.ON_A_CPU} and all(
        c.direction == "forward" for c in found
    )


def test_default_plan_of_cuda(cuda):
    found = kernel_cases.plan(KernelBenchOptions(directions=("forward", "backward")), DeviceOptions())
    eager = [(c.op, c.batch, c.tokens) for c in found if c.backend == "eager" and c.direction == "forward"]
    for op in ("chunk_gdn", "chunk_kda"):
        sizes = [(1, 512), (1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 2048), (16, 4096)]
        assert [call[1:] for call in eager if call[0] == op] == sizes
        triton = registry.get(op, "triton")
        served = triton.why_not(registry.Request(op, "cuda", torch.bfloat16, 1, 1, 8, 8)) is None
        assert any(c.backend == "triton" and c.direction == "backward" and c.op == op for c in found) == served
    for op in ("recurrent_gdn", "recurrent_kda"):
        assert [call[1:] for call in eager if call[0] == op] == [(b, 1) for b in (1, 8, 32, 128, 256)]
    assert not any(c.direction == "backward" for c in found if c.op.startswith("recurrent"))
    assert kernel_cases.target(KernelBenchOptions(), DeviceOptions()) == (torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("everything", [False, True])
def test_keys_are_unique_file_names(everything, cuda):
    options = KernelBenchOptions(directions=kernel_cases.DIRECTIONS, shapes=tuple(SHAPES) if everything else ())
    with backend("odd/name.1", lambda fn: fn), backend("odd", lambda fn: fn):
        keys = [kernel_cases.key(c) for c in kernel_cases.plan(options, DeviceOptions())]
    assert len(set(keys)) == len(keys) > 50
    assert all(re.fullmatch(r"[\w.%-]+", key) and len(key) < 100 for key in keys)


def test_sizes_asked_for():
    options = KernelBenchOptions(shapes=(TINY["gdn"],), backends=("eager",), batch=(2, 3, 2), tokens=(5, 7))
    calls = [(c.op, c.batch, c.tokens) for c in kernel_cases.plan(options, WHERE)]
    pairs = [("chunk_gdn", b, t) for b in (2, 3) for t in (5, 7)]
    assert calls == [*pairs, ("recurrent_gdn", 2, 1), ("recurrent_gdn", 3, 1)]
    calls = [
        (c.batch, c.tokens)
        for c in kernel_cases.plan(dataclasses.replace(options, ops=("chunk_gdn",), tokens=()), WHERE)
    ]
    assert calls == [(2, 512), (3, 512)]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(shapes=("gpt2",)), "--shape gpt2 is not known; shapes: qwen3_next-80b, kimi_linear-48b, "),
        (dict(ops=("conv",)), "--op conv is not known; ops: chunk_gdn, recurrent_gdn, chunk_kda, recurrent_kda"),
        (
            dict(backends=("auto",)),
            "--backend auto is not known; backends: transformers, triton, fla, numba, eager, flash_",
        ),
        (dict(directions=("up",)), "--direction up is not known; directions: forward, backward"),
        (dict(directions=()), "no direction is given; directions: forward, backward"),
        (dict(dtype="int8"), "--dtype int8 is not known; dtypes: float32, bfloat16, float16"),
        (dict(device="warp"), "--device warp cannot be used here: Expected one of cpu"),
        (dict(batch=(1, 0)), "--batch must be at least 1, got 1, 0"),
        (dict(tokens=(-1,)), "--tokens must be at least 1, got -1"),
        (dict(seconds=0.0), "--seconds must be above 0, got 0.0"),
        (dict(gpu_graph=True), "--gpu-graph needs a CUDA device; the device is cpu"),
        (dict(shapes=("olmo_hybrid",), ops=("chunk_kda",)), "--op chunk_kda is of none of the shapes olmo_hybrid"),
        (
            dict(shapes=("olmo_hybrid", "kimi_linear-48b"), ops=("chunk_kda",)),
            "--shape olmo_hybrid has no op chunk_kda; it has: chunk_gdn, recurrent_gdn",
        ),
        (dict(ops=("step_gdn",), directions=("backward",)), "--direction backward is of chunk ops"),
        (dict(first_call=True), "--first-call is of --level layer"),
        (dict(ops=("chunk_gdn", "recurrent_gdn"), directions=("backward",)), "--direction backward is of chunk ops"),
        (
            dict(backends=("triton",)),
            "backend 'triton' cannot serve chunk_gdn at qwen3_next-80b: needs a CUDA device; the tensors are on cpu",
        ),
        (dict(backends=("flash_qla",)), "backend 'flash_qla' cannot serve chunk_gdn at qwen3_next-80b: needs "),
        (dict(backends=("eager", "flash_qla"), ops=("chunk_kda",)), "backend 'flash_qla' has no kernel of chunk_kda"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_bad_options(changes, text):
    changes = dict(changes)
    with pytest.raises(UserError) as error:
        where = {name: changes.pop(name) for name in ("device", "dtype") if name in changes}
        kernel_cases.plan(KernelBenchOptions(**changes), DeviceOptions(**{"device": "cpu", **where}))
    assert text in str(error.value)


def test_a_backend_without_a_backward():
    options = KernelBenchOptions(shapes=(TINY["kda"],), ops=("chunk_kda",), directions=kernel_cases.DIRECTIONS)
    with backend("forward_only", lambda fn: fn, differentiable=False):
        found = [(c.backend, c.direction) for c in kernel_cases.plan(options, WHERE)]
        assert ("forward_only", "forward") in found and ("forward_only", "backward") not in found
        assert "forward_only is left out of chunk_kda: it has no backward" in kernel_cases.left_out(options, WHERE)
        with pytest.raises(UserError, match="'forward_only' cannot serve chunk_kda at kimi_linear-tiny: has no backw"):
            kernel_cases.plan(dataclasses.replace(options, backends=("forward_only",)), WHERE)


def test_what_is_left_out_says_why():
    lines = kernel_cases.left_out(KernelBenchOptions(), WHERE)
    everything = "chunk_gdn, recurrent_gdn, chunk_kda, recurrent_kda"
    assert any(line.startswith(f"triton is left out of {everything}: it needs a CUDA device") for line in lines)
    assert "flash_qla is left out of chunk_gdn: it needs " in str(lines)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_are_those_of_transformers(name):
    from transformers import AutoConfig

    shape = SHAPES[name]
    assert shape.part == (8 if name.endswith("-tp8") else 1)
    folder = models.ASSETS / name
    read = AutoConfig.from_pretrained(folder) if folder.is_dir() else AutoConfig.for_model(shape.model_type)
    config = read.get_text_config()
    if shape.variant == "kda":
        wanted = (config.linear_num_heads, config.linear_num_heads, config.linear_head_dim, config.linear_head_dim)
    else:
        heads = (config.linear_num_key_heads, config.linear_num_value_heads)
        wanted = (*heads, config.linear_key_head_dim, config.linear_value_head_dim)
    assert (shape.part * shape.k_heads, shape.part * shape.v_heads, shape.k_dim, shape.v_dim) == wanted
