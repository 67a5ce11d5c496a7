"""`hf-gdn kernels`: no time without a right result."""

import dataclasses
import json

import pytest
import torch

from hf_gdn import registry
from hf_gdn.eval import kernel_bench, kernel_cases, kernel_oracle, roofline, tables
from hf_gdn.eval.kernel_cases import Case
from hf_gdn.eval.kernel_results import Ceilings
from hf_gdn.eval.options import KernelBenchOptions
from hf_gdn.eval.records import as_dict
from hf_gdn.eval.results import Report
from hf_gdn.loading import models
from hf_gdn.loading.options import DeviceOptions
from tests.eval.planted import OPS, TINY, backend

FAST = KernelBenchOptions(seconds=1e-3)
CPU, WHERE = torch.device("cpu"), DeviceOptions(device="cpu")
CEILINGS = Ceilings(copy_gb_s=10.0, matmul_tflop_s=0.1)


def case(op, backend, tokens=70, direction="forward", batch=1):
    return Case(op, TINY[op[-3:]], batch, 1 if op.startswith("recurrent") else tokens, direction, backend)


def printed(rows):
    rows = kernel_bench.with_shares(kernel_bench.with_ratios(rows), CEILINGS)
    found = tables.of_report(Report(kernels=rows, ceilings=CEILINGS))
    return "\n".join("  ".join(row) for sheet in found for row in [(sheet.title,), sheet.header, *sheet.rows])


def forgetful(fn):
    """Does not decay the state."""
    return lambda q, k, v, g, beta, **kwargs: fn(q, k, v, torch.zeros_like(g), beta, **kwargs)


def measure(case, options=FAST, dtype="float32"):
    return kernel_bench.measure(case, options, CPU, models.DTYPES[dtype])


@pytest.mark.parametrize("direction", kernel_cases.DIRECTIONS)
@pytest.mark.parametrize("tokens", [70, 300])
@pytest.mark.parametrize("op", ["chunk_gdn", "chunk_kda"])
def test_chunk_rows(op, tokens, direction):
    rows = [measure(case(op, name, tokens, direction)) for name in ("transformers", "eager")]
    for row in rows:
        assert row.passed and row.error < row.budget == 1e-5 and row.note is None
        assert row.oracle == ("loop" if tokens == 70 else "eager float64")
        assert 0 < row.low <= row.ms <= row.high and row.runs >= 3 and row.first_ms > 0
        work = roofline.flops(
            op,
            batch=1,
            tokens=tokens,
            k_heads=row.k_heads,
            v_heads=4,
            k_dim=32,
            v_dim=32,
            backward=direction == "backward",
        )
        assert row.tflop_s == pytest.approx(work / row.ms / 1e9) and row.gb_s > 0 and row.extra_mib > 0
    rows = kernel_bench.with_ratios(kernel_bench.with_shares(rows, CEILINGS))
    assert rows[0].speedup == rows[0].memory_ratio == 1
    assert rows[1].speedup == pytest.approx(rows[0].ms / rows[1].ms)
    assert rows[1].share_compute == pytest.approx(10 * rows[1].tflop_s)
    assert rows[1].share_bandwidth == pytest.approx(rows[1].gb_s / 10)
    assert json.loads(json.dumps(as_dict(rows), allow_nan=False)) == as_dict(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", ["recurrent_gdn", "recurrent_kda"])
def test_decode_rows(op, dtype):
    for name in ("transformers", "eager"):
        row = measure(case(op, name, batch=3), dtype=dtype)
        assert row.passed and row.ms > 0 and row.oracle == "loop" and row.dtype == dtype, row


@pytest.mark.parametrize("op", OPS)
def test_kernels_prints_no_time_for_a_wrong_result(op):
    with backend("broken", forgetful):
        rows = [measure(case(op, name)) for name in ("transformers", "eager", "broken")]
    rows = kernel_bench.with_shares(kernel_bench.with_ratios(rows), CEILINGS)
    assert [row.passed for row in rows] == [True, True, False]
    wrong = rows[2]
    times = ("ms", "low", "high", "runs", "first_ms", "tflop_s", "gb_s", "share_compute", "share_bandwidth", "speedup")
    assert all(getattr(wrong, name) is None for name in times)
    assert wrong.error > 1e-2 and wrong.worst in ("o", "final_state")
    assert wrong.note == f"wrong result: {wrong.worst}"
    text = printed(rows)
    line = next(line for line in text.splitlines() if "broken" in line)
    assert "wrong result" in line and "×" not in line.partition("broken")[2] and f"{wrong.error:.1e}" in line
    assert "eager" in text and f"wrong result: {wrong.worst}" in text


def test_a_wrong_gradient_has_no_time():
    def make(fn):
        def call(q, k, v, *args, **kwargs):
            return fn(q, k, 1.5 * v - 0.5 * v.detach(), *args, **kwargs)

        return call

    with backend("skewed", make):
        assert measure(case("chunk_gdn", "skewed")).passed
        row = measure(case("chunk_gdn", "skewed", direction="backward"))
    assert row.passed is False and row.ms is None and row.worst == "dv"
    assert row.error == pytest.approx(0.5, rel=1e-3)


def test_what_is_not_finite_or_out_of_shape_is_wrong():
    with backend("nan", lambda fn: lambda *a, **kw: tuple(x * float("nan") for x in fn(*a, **kw))):
        row = measure(case("chunk_gdn", "nan"))
    assert row.passed is False and row.error is None and row.worst == "o"
    with backend("flat", lambda fn: lambda *a, **kw: (fn(*a, **kw)[0][..., :1], fn(*a, **kw)[1])):
        assert measure(case("chunk_gdn", "flat")).passed is False


def test_decoding_not_in_place_is_wrong():
    with backend("copying", lambda fn: lambda *a, inplace=False, **kw: fn(*a, **kw)):
        row = measure(case("recurrent_kda", "copying"))
    assert row.passed is False and row.worst == "final_state"


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
        row = measure(case("chunk_gdn", "failing"))
    assert row.passed is passed and row.note == note and row.ms is None
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
        shapes=(TINY[op[-3:]],),
        ops=(op,),
        seconds=0.01,
        gpu_graph=gpu_graph,
        tokens=() if op.startswith("recurrent") else (70,),
        directions=("forward",) if op.startswith("recurrent") else kernel_cases.DIRECTIONS,
    )
    where = DeviceOptions(device="cuda")
    target = kernel_cases.target(options, where)
    rows = [kernel_bench.measure(c, options, *target) for c in kernel_cases.plan(options, where)]
    ours = [row for row in rows if row.backend in ("transformers", "triton", "eager")]
    assert ours and all(row.passed and row.ms > 0 for row in ours), ours


# --------------------------------------------------------------------------------------- ops around the delta rule


LAYER_OPS = ("step_gdn", "step_kda", "prologue_gdn", "prologue_kda", "gated_norm")


def layer_case(op, backend="eager", tokens=20):
    shape = TINY["kda" if op.endswith("kda") else "gdn"]
    return Case(op, shape, 2, 1 if op.startswith("step") else tokens, "forward", backend)


@pytest.mark.parametrize("tokens", [20, 300])
@pytest.mark.parametrize("op", LAYER_OPS)
def test_rows_of_the_other_ops(op, tokens):
    row = measure(layer_case(op, tokens=tokens))
    assert row.passed and row.error < 1e-5 and row.ms > 0 and row.gb_s > 0 and row.tflop_s is None, row
    assert row.oracle == "loop"
    (row,) = kernel_bench.with_ratios(kernel_bench.with_shares([row], CEILINGS))
    assert row.share_bandwidth == pytest.approx(row.gb_s / 10) and row.share_compute is None and row.speedup is None
    assert op in printed([row])


@pytest.mark.parametrize("op", ["step_gdn", "prologue_kda"])
def test_a_wrong_result_of_the_other_ops_has_no_time(op):
    def make(fn):
        def call(**kwargs):
            weights = kwargs["weights"]
            return fn(**{**kwargs, "weights": weights._replace(dt_bias=weights.dt_bias + 1)})

        return call

    with backend("off", make, ops=(op,)):
        row = measure(layer_case(op, "off"))
    assert row.passed is False and row.ms is None and row.worst in ("y", "state", "g")


def test_bytes_of_the_other_ops_by_hand():
    job = kernel_oracle.prepare(layer_case("gated_norm"), CPU, torch.bfloat16)
    assert kernel_oracle.moved_bytes_of_layer_op(job) == 2 * (3 * 2 * 20 * 4 * 32 + 32)  # o, z and y, and the weight
    job = kernel_oracle.prepare(layer_case("step_gdn"), CPU, torch.bfloat16)
    channels = 2 * 2 * 32 + 4 * 32
    raw, weights = 2 * (channels + 2 * 4 + 4 * 32), channels * 4 + 4 + 4 + 32
    windows, states = 2 * channels * 4, 2 * 4 * 32 * 32
    wanted = 2 * (raw + weights + 2 * windows + 2 * 4 * 32) + 4 * 2 * states
    assert kernel_oracle.moved_bytes_of_layer_op(job) == wanted


def test_recurrent_ops_take_tokens_where_they_are_named():
    """So that they can be compared with the chunked ones at few tokens."""
    options = KernelBenchOptions(shapes=(TINY["gdn"],), ops=("chunk_gdn", "recurrent_gdn"), tokens=(1, 4), batch=(1,))
    found = [(c.op, c.tokens) for c in kernel_cases.plan(options, WHERE) if c.backend == "eager"]
    assert found == [("chunk_gdn", 1), ("chunk_gdn", 4), ("recurrent_gdn", 1), ("recurrent_gdn", 4)]
    row = measure(Case("recurrent_gdn", TINY["gdn"], 1, 4, "forward", "eager"))
    assert row.passed and row.tokens == 4


@pytest.mark.parametrize("op", ["chunk_gdn", "recurrent_kda"])
def test_normalized_inputs(op):
    seen = []

    def make(fn):
        def call(*args, qk_l2norm, **kwargs):
            seen.append(qk_l2norm)
            return fn(*args, **kwargs, qk_l2norm=qk_l2norm)  # the first one says where it runs

        return call

    with backend("watched", make, ops=(op,)):
        assert measure(case(op, "watched"), dataclasses.replace(FAST, normalized=True)).passed
    assert set(seen) == {False}
