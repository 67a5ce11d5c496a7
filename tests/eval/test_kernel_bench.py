"""`hf-gdn kernels`: the plan and its errors, and no time without a right result."""

import contextlib
import dataclasses
import json
import re

import pytest
import torch

from hf_gdn import registry
from hf_gdn.errors import UserError
from hf_gdn.eval import kernel_bench, kernel_cases, kernel_oracle, tables, timing
from hf_gdn.eval.kernel_bench import Case, KernelBenchOptions
from hf_gdn.loading import models

TINY = {"gdn": "qwen3_next-tiny", "kda": "kimi_linear-tiny"}
OPS = ("chunk_gdn", "recurrent_gdn", "chunk_kda", "recurrent_kda")
FAST = KernelBenchOptions(device="cpu", seconds=1e-3)
CEILINGS = {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1}


def case(op, backend, tokens=70, direction="forward", batch=1):
    return Case(op, TINY[op[-3:]], batch, 1 if op.startswith("recurrent") else tokens, direction, backend)


@pytest.fixture
def cuda(monkeypatch):
    """A plan for a CUDA device that is not there."""
    monkeypatch.setattr(models, "pick_device", lambda name: torch.device("cuda"))


@contextlib.contextmanager
def backend(name, make, ops=OPS, **changes):
    """Register kernels of a backend, made of the eager ones."""
    for op in ops:
        eager = registry.get(op, "eager")
        registry.register(dataclasses.replace(eager, backend=name, fn=make(eager.fn), **changes))
    try:
        yield
    finally:
        for op in ops:
            registry.unregister(op, name)


def printed(rows):
    rows = kernel_bench.with_shares(kernel_bench.with_ratios(rows), CEILINGS)
    found = tables.of_report({"results": [], "kernels": rows, "ceilings": CEILINGS})
    return "\n".join("  ".join(row) for sheet in found for row in [(sheet.title,), sheet.header, *sheet.rows])


def forgetful(fn):
    """Does not decay the state."""
    return lambda q, k, v, g, beta, **kwargs: fn(q, k, v, torch.zeros_like(g), beta, **kwargs)


# ---------------------------------------------------------------------------------------------------------------- plan


def test_default_plan_of_a_cpu():
    found = kernel_cases.plan(KernelBenchOptions(device="cpu"))
    calls = [(c.op, c.shape, c.batch, c.tokens) for c in found if c.backend == "eager"]
    qwen, kimi = "qwen3_next-80b", "kimi_linear-48b"
    assert calls == [
        ("chunk_gdn", qwen, 1, 512), ("chunk_gdn", qwen, 1, 2048),
        ("recurrent_gdn", qwen, 1, 1), ("recurrent_gdn", qwen, 4, 1),
        ("chunk_kda", kimi, 1, 128), ("chunk_kda", kimi, 1, 512),
        ("recurrent_kda", kimi, 1, 1), ("recurrent_kda", kimi, 4, 1),
    ]  # fmt: skip
    assert {c.backend for c in found} == {"transformers", "eager"} and all(c.direction == "forward" for c in found)


def test_default_plan_of_cuda(cuda):
    found = kernel_cases.plan(KernelBenchOptions(directions=("forward", "backward")))
    eager = [(c.op, c.batch, c.tokens) for c in found if c.backend == "eager" and c.direction == "forward"]
    for op in ("chunk_gdn", "chunk_kda"):
        sizes = [(1, 512), (1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 2048), (16, 4096)]
        assert [call[1:] for call in eager if call[0] == op] == sizes
        triton = registry.get(op, "triton")
        served = (
            triton.differentiable and triton.why_not(registry.Request(op, "cuda", torch.bfloat16, 1, 1, 8, 8)) is None
        )
        assert any(c.backend == "triton" and c.direction == "backward" and c.op == op for c in found) == served
    for op in ("recurrent_gdn", "recurrent_kda"):
        assert [call[1:] for call in eager if call[0] == op] == [(b, 1) for b in (1, 8, 32, 128, 256)]
    assert not any(c.direction == "backward" for c in found if c.op.startswith("recurrent"))
    assert kernel_bench.target(KernelBenchOptions()) == (torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("everything", [False, True])
def test_keys_are_unique_file_names(everything, cuda):
    options = KernelBenchOptions(
        directions=kernel_cases.DIRECTIONS, shapes=tuple(kernel_cases.SHAPES) if everything else ()
    )
    with backend("odd/name.1", lambda fn: fn), backend("odd", lambda fn: fn):
        keys = [kernel_bench.key(c) for c in kernel_cases.plan(options)]
    assert len(set(keys)) == len(keys) > 50
    assert all(re.fullmatch(r"[\w.%-]+", key) and len(key) < 100 for key in keys)


def test_sizes_asked_for():
    options = KernelBenchOptions(
        shapes=(TINY["gdn"],), device="cpu", backends=("eager",), batch=(2, 3, 2), tokens=(5, 7)
    )
    calls = [(c.op, c.batch, c.tokens) for c in kernel_cases.plan(options)]
    pairs = [("chunk_gdn", b, t) for b in (2, 3) for t in (5, 7)]
    assert calls == [*pairs, ("recurrent_gdn", 2, 1), ("recurrent_gdn", 3, 1)]
    calls = [
        (c.batch, c.tokens) for c in kernel_cases.plan(dataclasses.replace(options, ops=("chunk_gdn",), tokens=()))
    ]
    assert calls == [(2, 512), (3, 512)]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(shapes=("gpt2",)), "--shape gpt2 is not known; shapes: qwen3_next-80b, kimi_linear-48b, "),
        (dict(ops=("conv",)), "--op conv is not known; ops: chunk_gdn, recurrent_gdn, chunk_kda, recurrent_kda"),
        (dict(backends=("auto",)), "--backend auto is not known; backends: transformers, triton, fla, eager, flash_"),
        (dict(directions=("up",)), "--direction up is not known; directions: forward, backward"),
        (dict(directions=()), "no direction is given; directions: forward, backward"),
        (dict(dtype="int8"), "--dtype int8 is not known; dtypes: float32, bfloat16, float16"),
        (dict(device="warp"), "--device warp cannot be used; devices here: cpu"),
        (dict(batch=(1, 0)), "--batch must be at least 1, got 1, 0"),
        (dict(tokens=(-1,)), "--tokens must be at least 1, got -1"),
        (dict(seconds=0.0), "--seconds must be above 0, got 0.0"),
        (dict(gpu_graph=True), "--gpu-graph needs a CUDA device; the device is cpu"),
        (dict(shapes=("olmo_hybrid",), ops=("chunk_kda",)), "--op chunk_kda is of none of the shapes olmo_hybrid"),
        (
            dict(shapes=("olmo_hybrid", "kimi_linear-48b"), ops=("chunk_kda",)),
            "--shape olmo_hybrid has no op chunk_kda; it has: chunk_gdn, recurrent_gdn",
        ),
        (dict(ops=("recurrent_gdn",), tokens=(5,)), "--tokens are of chunk ops; a call of recurrent_gdn takes one"),
        (dict(ops=("chunk_gdn", "recurrent_gdn"), directions=("backward",)), "--direction backward is of chunk ops"),
        (
            dict(backends=("triton",)),
            "backend 'triton' cannot serve chunk_gdn at qwen3_next-80b: needs a CUDA device; the tensors are on cpu",
        ),
        (dict(backends=("flash_qla",)), "backend 'flash_qla' cannot serve chunk_gdn at qwen3_next-80b: needs "),
        (dict(backends=("eager", "flash_qla"), ops=("chunk_kda",)), "backend 'flash_qla' has no kernel of chunk_kda"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_options(changes, text):
    with pytest.raises(UserError) as error:
        kernel_cases.plan(KernelBenchOptions(**{"device": "cpu", **changes}))
    assert text in str(error.value)


def test_a_backend_without_a_backward():
    options = KernelBenchOptions(
        device="cpu", shapes=(TINY["kda"],), ops=("chunk_kda",), directions=kernel_cases.DIRECTIONS
    )
    with backend("forward_only", lambda fn: fn, differentiable=False):
        found = [(c.backend, c.direction) for c in kernel_cases.plan(options)]
        assert ("forward_only", "forward") in found and ("forward_only", "backward") not in found
        assert "forward_only is left out of chunk_kda: it has no backward" in kernel_cases.left_out(options)
        with pytest.raises(UserError, match="'forward_only' cannot serve chunk_kda at kimi_linear-tiny: has no backw"):
            kernel_cases.plan(dataclasses.replace(options, backends=("forward_only",)))


def test_what_is_left_out_says_why():
    lines = kernel_cases.left_out(KernelBenchOptions(device="cpu"))
    everything = "chunk_gdn, recurrent_gdn, chunk_kda, recurrent_kda"
    assert any(line.startswith(f"triton is left out of {everything}: it needs a CUDA device") for line in lines)
    assert "flash_qla is left out of chunk_gdn: it needs " in str(lines)


@pytest.mark.parametrize("name", sorted(kernel_cases.SHAPES))
def test_shapes_are_those_of_transformers(name):
    from transformers import AutoConfig

    shape, part = kernel_cases.SHAPES[name], 8 if name.endswith("-tp8") else 1
    folder = models.ASSETS / name
    read = AutoConfig.from_pretrained(folder) if folder.is_dir() else AutoConfig.for_model(shape.model_type)
    config = read.get_text_config()
    if shape.mixer == "kda":
        wanted = (config.linear_num_heads, config.linear_num_heads, config.linear_head_dim, config.linear_head_dim)
    else:
        heads = (config.linear_num_key_heads, config.linear_num_value_heads)
        wanted = (*heads, config.linear_key_head_dim, config.linear_value_head_dim)
    assert (part * shape.k_heads, part * shape.v_heads, shape.k_dim, shape.v_dim) == wanted


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("direction", kernel_cases.DIRECTIONS)
@pytest.mark.parametrize("tokens", [70, 300])
@pytest.mark.parametrize("op", ["chunk_gdn", "chunk_kda"])
def test_chunk_rows(op, tokens, direction):
    rows = [kernel_bench.measure(case(op, name, tokens, direction), FAST) for name in ("transformers", "eager")]
    for row in rows:
        assert row["passed"] and row["error"] < row["budget"] == 1e-5 and row["note"] is None
        assert row["oracle"] == ("loop" if tokens == 70 else "eager float64")
        assert 0 < row["low"] <= row["ms"] <= row["high"] and row["runs"] >= 3 and row["first_ms"] > 0
        work = timing.flops(
            op, batch=1, tokens=tokens, k_heads=row["k_heads"], v_heads=4, k_dim=32, v_dim=32,
            backward=direction == "backward",
        )  # fmt: skip
        assert row["tflop_s"] == pytest.approx(work / row["ms"] / 1e9) and row["gb_s"] > 0 and row["extra_mib"] > 0
    rows = kernel_bench.with_ratios(kernel_bench.with_shares(rows, CEILINGS))
    assert rows[0]["speedup"] == rows[0]["memory_ratio"] == 1
    assert rows[1]["speedup"] == pytest.approx(rows[0]["ms"] / rows[1]["ms"])
    assert rows[1]["share_compute"] == pytest.approx(10 * rows[1]["tflop_s"])
    assert rows[1]["share_bandwidth"] == pytest.approx(rows[1]["gb_s"] / 10)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", ["recurrent_gdn", "recurrent_kda"])
def test_decode_rows(op, dtype):
    for name in ("transformers", "eager"):
        row = kernel_bench.measure(case(op, name, batch=3), dataclasses.replace(FAST, dtype=dtype))
        assert row["passed"] and row["ms"] > 0 and row["oracle"] == "loop" and row["dtype"] == dtype, row


@pytest.mark.parametrize("op", OPS)
def test_kernels_prints_no_time_for_a_wrong_result(op):
    with backend("broken", forgetful):
        rows = [kernel_bench.measure(case(op, name), FAST) for name in ("transformers", "eager", "broken")]
    rows = kernel_bench.with_shares(kernel_bench.with_ratios(rows), CEILINGS)
    assert [row["passed"] for row in rows] == [True, True, False]
    wrong = rows[2]
    times = ("ms", "low", "high", "runs", "first_ms", "tflop_s", "gb_s", "share_compute", "share_bandwidth", "speedup")
    assert all(wrong[name] is None for name in times)
    assert wrong["error"] > 1e-2 and wrong["worst"] in ("o", "final_state")
    assert wrong["note"] == f"wrong result: {wrong['worst']}"
    text = printed(rows)
    line = next(line for line in text.splitlines() if "broken" in line)
    assert "wrong result" in line and "×" not in line.partition("broken")[2] and f"{wrong['error']:.1e}" in line
    assert "eager" in text and f"wrong result: {wrong['worst']}" in text


def test_a_wrong_gradient_has_no_time():
    def make(fn):
        def call(q, k, v, *args, **kwargs):
            return fn(q, k, 1.5 * v - 0.5 * v.detach(), *args, **kwargs)

        return call

    with backend("skewed", make):
        assert kernel_bench.measure(case("chunk_gdn", "skewed"), FAST)["passed"]
        row = kernel_bench.measure(case("chunk_gdn", "skewed", direction="backward"), FAST)
    assert row["passed"] is False and row["ms"] is None and row["worst"] == "dv"
    assert row["error"] == pytest.approx(0.5, rel=1e-3)


def test_what_is_not_finite_or_out_of_shape_is_wrong():
    with backend("nan", lambda fn: lambda *a, **kw: tuple(x * float("nan") for x in fn(*a, **kw))):
        row = kernel_bench.measure(case("chunk_gdn", "nan"), FAST)
    assert row["passed"] is False and row["error"] is None and row["worst"] == "o"
    with backend("flat", lambda fn: lambda *a, **kw: (fn(*a, **kw)[0][..., :1], fn(*a, **kw)[1])):
        assert kernel_bench.measure(case("chunk_gdn", "flat"), FAST)["passed"] is False


def test_decoding_not_in_place_is_wrong():
    with backend("copying", lambda fn: lambda *a, inplace=False, **kw: fn(*a, **kw)):
        row = kernel_bench.measure(case("recurrent_kda", "copying"), FAST)
    assert row["passed"] is False and row["worst"] == "final_state"


@pytest.mark.parametrize(
    ("error", "passed", "note"),
    [
        (RuntimeError("no [such] card\nmore"), False, "failed: no [such] card"),
        (AssertionError(), False, "failed: AssertionError"),
        (torch.OutOfMemoryError("tried to allocate"), None, "out of memory"),
    ],
)
def test_a_failing_backend_is_a_row(error, passed, note):
    def fail(*args, **kwargs):
        raise error

    with backend("failing", lambda fn: fail):
        row = kernel_bench.measure(case("chunk_gdn", "failing"), FAST)
    assert row["passed"] is passed and row["note"] == note and row["ms"] is None
    assert note in printed([row])


def test_the_oracle_of_long_calls_is_checked_and_kept(monkeypatch):
    calls = []
    eager = registry.get("chunk_gdn", "eager")
    monkeypatch.setattr(kernel_oracle, "LOOP", 16)
    kernel_oracle._last.clear()

    def get(op, name):
        return dataclasses.replace(eager, fn=lambda *a, **kw: calls.append(1) or eager.fn(*a, **kw))

    monkeypatch.setattr(registry, "get", get)
    job = kernel_oracle.prepare(case("chunk_gdn", "eager"), torch.device("cpu"), torch.float32)
    assert job.oracle == "eager float64" and len(calls) == 2
    assert kernel_oracle.prepare(case("chunk_gdn", "other"), torch.device("cpu"), torch.float32) is job
    monkeypatch.setattr(registry, "get", lambda op, name: dataclasses.replace(eager, fn=forgetful(eager.fn)))
    with pytest.raises(RuntimeError, match="of the float64 eager kernel is .* off the oracle, allowed 1e-10"):
        kernel_oracle.prepare(case("chunk_gdn", "eager", tokens=71), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("direction", kernel_cases.DIRECTIONS)
@pytest.mark.parametrize("op", ["chunk_gdn", "chunk_kda"])
def test_the_oracle_by_groups_of_heads_is_the_oracle(op, direction, monkeypatch):
    found = []
    for elements in (1 << 22, 1):
        kernel_oracle._last.clear()
        monkeypatch.setattr(kernel_oracle, "_ELEMENTS", elements)
        found.append(
            kernel_oracle.prepare(case(op, "eager", 9, direction, 2), torch.device("cpu"), torch.float32).wanted
        )
    assert found[0].keys() == found[1].keys() and len(found[0]) == (8 if direction == "backward" else 2)
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-12, atol=1e-13)
    inputs = registry.ops()[op].make_inputs(B=2, T=9, HK=4, HV=4, K=32, V=32)
    shapes = dict(zip(("dq", "dk", "dv", "dg", "dbeta", "dinitial_state"), inputs.values()))
    if direction == "backward" and op == "chunk_kda":
        assert all(found[0][name].shape == x.shape for name, x in shapes.items())
    kernel_oracle._last.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_graph", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_rows_on_a_gpu(op, gpu_graph):
    options = KernelBenchOptions(
        shapes=(TINY[op[-3:]],), ops=(op,), device="cuda", seconds=0.01, gpu_graph=gpu_graph,
        tokens=() if op.startswith("recurrent") else (70,),
        directions=("forward",) if op.startswith("recurrent") else kernel_cases.DIRECTIONS,
    )  # fmt: skip
    rows = [kernel_bench.measure(c, options) for c in kernel_cases.plan(options)]
    ours = [row for row in rows if row["backend"] in ("transformers", "triton", "eager")]
    assert ours and all(row["passed"] and row["ms"] > 0 for row in ours), ours
