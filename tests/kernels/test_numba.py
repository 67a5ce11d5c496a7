"""The numba backend: threads, processes, dtypes as bits, torch.compile, and everything that can go wrong with numba.

What holds for every backend is in test_cases.py.
"""

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import hf_gdn
from hf_gdn import log, operators, registry
from hf_gdn.kernels.numba import library, runtime
from hf_gdn.testing import assert_same
from hf_gdn.testing.calls import run
from hf_gdn.upstream import openmp
from tests import tiny_models as tiny

pytest.importorskip("numba")

OPS = ("step_gdn", "step_kda", "prologue_gdn", "prologue_kda", "recurrent_gdn", "recurrent_kda", "gated_norm")
every_op = pytest.mark.parametrize("op", OPS)


def kernel(op):
    return registry.get(op, "numba")


def large_call(op, dtype=torch.bfloat16):
    """Arguments with enough work for several threads."""
    heads = 4 if op.endswith("kda") else 2
    return registry.ops()[op].make_inputs(B=2, T=70, HK=heads, HV=4, K=64, V=64, dtype=dtype)


@pytest.fixture
def threads():
    """A function that sets the number of threads, which is one again afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def unloaded(monkeypatch):
    """As if no function had been loaded yet in this process."""
    monkeypatch.setattr(library, "_verdicts", {})
    monkeypatch.setattr(library, "_functions", {})
    monkeypatch.setattr(registry, "_chosen", {})
    monkeypatch.setattr(log, "warned", set())


# ------------------------------------------------------------------------------------------------------------ threads


@every_op
@pytest.mark.parametrize("pool", ["torch's", "of Python"])
def test_results_do_not_depend_on_the_number_of_threads(op, pool, threads, monkeypatch):
    if pool == "of Python":
        monkeypatch.setattr(openmp, "_openmp", lambda: None)
    call = large_call(op)
    threads(1)
    alone = run(kernel(op), call)
    for count in (2, 3, 8):
        threads(count)
        for name, x in run(kernel(op), call).items():
            assert_same(f"{name}, {count} threads", x, alone[name])


@pytest.mark.skipif(sys.platform != "linux", reason="names of OpenMP libraries")
def test_torchs_own_pool_of_threads_is_used():
    assert openmp._openmp() is not None


def test_a_small_call_stays_on_its_thread(threads, monkeypatch):
    monkeypatch.setattr(openmp, "threads_for", lambda tasks: pytest.fail("asked for threads"))
    threads(2)
    run(kernel("step_gdn"), registry.ops()["step_gdn"].make_inputs(K=16, V=16))


@every_op
def test_threads_of_python_may_call_at_once(op, threads):
    threads(2)
    calls = [large_call(op) for _ in range(4)]
    wanted, found = run(kernel(op), calls[0]), {}

    def work(i):
        for _ in range(5):
            found[i] = run(kernel(op), calls[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(4):
        for name, x in found[i].items():
            assert_same(name, x, wanted[name])


def _in_a_fork(queue, call):
    queue.put(kernel("recurrent_gdn").fn(**call)[0].tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_call(threads, monkeypatch):
    """OpenMP's threads do not exist in it: libgomp would wait for them forever. So would torch's own operators, which
    is why the tensors are too small for those."""
    monkeypatch.setattr(runtime, "SMALL", 0)
    threads(2)
    call = registry.ops()["recurrent_gdn"].make_inputs(T=3, K=16, V=16)
    wanted = kernel("recurrent_gdn").fn(**call)[0].tolist()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_in_a_fork, args=(queue, call))
    process.start()
    process.join(30)
    hangs = process.is_alive()
    process.kill()
    assert not hangs and queue.get() == wanted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_forked_while_a_thread_compiles(monkeypatch, unloaded):
    compiling = threading.Event()
    monkeypatch.setattr(library, "_load", lambda dtype: compiling.set() or time.sleep(0.5))
    thread = threading.Thread(target=library.why_not, args=(torch.float32,))
    thread.start()
    compiling.wait()
    process = multiprocessing.get_context("fork").Process(target=library.why_not, args=(torch.float64,))
    process.start()
    thread.join()
    process.join(10)
    hangs = process.is_alive()
    process.kill()
    assert not hangs


# ------------------------------------------------------------------------------------------------------ dtypes as bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_number_of_16_bits_is_read_as_torch_reads_it(dtype):
    """A delta rule of one token, without state: the state becomes k u^T with k = 1, so v itself."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    v = bits.view(dtype).view(1, 1, 256, 256)
    k = torch.ones(1, 1, 256, 1, dtype=dtype)
    g, beta = torch.zeros(1, 1, 256), torch.ones(1, 1, 256)
    _, state = kernel("recurrent_gdn").fn(k, k, v, g, beta, scale=1.0)
    assert_bits(state.view(v.shape), v.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("columns", [256, 13], ids=["whole vectors", "the rest of a row"])
def test_numbers_are_rounded_as_torch_rounds_them(dtype, columns):
    """o = S^T q of a state with one row: every 16-bit number, its neighbours in fp32, and what lies half-way."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = bits.view(dtype).float()
    exact = exact[exact.isfinite()]
    half = (exact.double() + torch.nextafter(exact.to(dtype), torch.tensor(torch.inf, dtype=dtype)).double()) / 2
    half = half.float()
    up, down = (torch.tensor(x) for x in (torch.inf, -torch.inf))
    special = torch.tensor([torch.nan, 65519.9, 65520.0, -65520.0, 1e-8, 3e38, -3e38])
    found = torch.cat((exact, half, torch.nextafter(half, up), torch.nextafter(half, down), special))
    found = found[~found.isinf()]  # times k = 0 they are NaN
    found = torch.cat((found, found.new_zeros(-len(found) % columns))).view(1, -1, 1, columns)
    heads = found.shape[1]
    q = torch.ones(1, 1, heads, 1, dtype=dtype)
    zeros = torch.zeros(1, 1, heads)
    v = torch.zeros(1, 1, heads, columns, dtype=dtype)
    o, _ = kernel("recurrent_gdn").fn(q, 0 * q, v, zeros, zeros, scale=1.0, initial_state=found)
    assert_bits(o.flatten(), found.to(dtype).flatten())


def assert_bits(got, wanted):
    """Equal bits, except that any NaN is as good as another and that a sum makes +0 of -0."""
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    assert same.all(), f"{int((~same).sum())} numbers differ, for example {wanted[~same][0]} is {got[~same][0]}"


# ----------------------------------------------------------------------------------------------------- torch.compile


def test_compiled_layers_call_operators():
    model = tiny.model("qwen3_next")
    ids, _ = tiny.batch()
    with hf_gdn.patched(backend="numba"), torch.no_grad():
        wanted = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same("logits", compiled(ids).logits, wanted)


@pytest.mark.parametrize("op", ["step_gdn", "step_kda"])
def test_a_step_is_an_operator(op):
    call = registry.ops()[op].make_inputs(HK=2, HV=2, K=8, V=8)
    weights = call["weights"]
    tensors = (*call["projected"][:6], *weights, call["conv_state"], call["state"])
    torch.library.opcheck(operators.STEP_OPERATORS[op], (*tensors, *call["spec"], "numba", "auto"))


@every_op
def test_another_default_device(op):
    call = large_call(op)
    wanted = run(kernel(op), call)
    with torch.device("meta"):
        got = run(kernel(op), call)
    for name, x in got.items():
        assert_same(name, x, wanted[name])


def test_tensors_without_memory():
    call = registry.ops()["recurrent_gdn"].make_inputs(T=3, K=16, V=16, device="meta")
    with pytest.raises(RuntimeError, match="'numba' needs tensors with memory of their own; got a Tensor on meta"):
        kernel("recurrent_gdn").fn(**call)


# ------------------------------------------------------------------------------------------------------- choosing it


def test_auto_takes_it_on_a_cpu_for_inference_only(caplog, monkeypatch):
    monkeypatch.setattr(log, "warned", set())
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        for op in registry.ops():
            request = registry.Request(op, "cpu", torch.bfloat16, 2, 4, 64, 64)
            assert registry.resolve(request).backend == ("eager" if op.startswith("backward") else "numba")
            assert registry.resolve(request, needs_grad=True).backend == "eager"
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(device_type="cuda"), "needs tensors on a CPU; these are on cuda"),
        (dict(dtype=torch.int8), "serves float16, bfloat16, float32 and float64; the tensors are int8"),
        (dict(head_v_dim=257), "serves head dimensions up to 256; K is 64 and V is 257"),
    ],
    ids=["device", "dtype", "dims"],
)
def test_it_says_what_it_does_not_serve(change, sentence):
    fields = dict(op="chunk_gdn", device_type="cpu", dtype=torch.float32, num_k_heads=2, num_v_heads=4)
    request = registry.Request(**fields | dict(head_k_dim=64, head_v_dim=64) | change)
    assert kernel("chunk_gdn").why_not(request) == sentence


# ------------------------------------------------------------------------------------------------- what can go wrong

REQUEST = registry.Request("recurrent_gdn", "cpu", torch.float32, 2, 4, 64, 64)


def refusal(caplog):
    """The sentence of the one warning with which eager takes over."""
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        for _ in range(2):
            assert registry.resolve(REQUEST).backend == "eager"
    (message,) = [text for text in caplog.messages if text.startswith("hf_gdn runs on the eager backend")]
    return message.partition("numba ")[2]


def test_without_numba_one_warning_says_what_to_install(caplog, monkeypatch, unloaded):
    find_spec = library.importlib.util.find_spec
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None if name == "numba" else find_spec(name))
    assert "pip install 'hf-gdn[cpu]'" in refusal(caplog)


def test_a_numba_that_cannot_be_imported(caplog, monkeypatch, unloaded):
    import hf_gdn.kernels.numba.compiled as package

    monkeypatch.delattr(package, "entry", raising=False)
    monkeypatch.setitem(sys.modules, "hf_gdn.kernels.numba.compiled.entry", None)
    assert refusal(caplog).startswith("needs a numba that can be imported; this one raises ")


def test_a_cache_folder_that_cannot_be_written(caplog, monkeypatch, tmp_path, unloaded):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_GDN_CACHE", str(tmp_path / "file" / "folder"))
    sentence = refusal(caplog)
    assert sentence.startswith("needs a folder for compiled functions; ") and "HF_GDN_CACHE" in sentence


def test_a_broken_cache_file(tmp_path):
    """The eager backend serves, with one warning; the next process compiles again. In processes of their own, because
    a function that was compiled stays in memory. A second copy of the sources compiles nothing."""
    code = """
import torch
from hf_gdn import registry
from hf_gdn.kernels.numba import library, runtime
library.LAYOUTS = {"gated_norm": library.LAYOUTS["gated_norm"]}  # one function is enough, and quick to compile
print(registry.resolve(registry.Request("gated_norm", "cpu", torch.float32, 2, 4, 64, 64)).backend)
"""
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "hf_gdn").symlink_to(Path(hf_gdn.__file__).parent)

    env = os.environ | {"HF_GDN_CACHE": str(tmp_path / "cache")}

    def process(code=code, **options):
        return subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, **options
        )

    first = process()
    assert first.stdout == "numba\n" and first.stderr.count("compiling CPU kernels") == 1, first.stderr
    assert str(tmp_path) in first.stderr
    second = process()
    assert (second.stdout, second.stderr) == ("numba\n", "")
    copy = process(code + "print(library.__file__)", cwd=tmp_path / "copy")
    assert copy.stderr == "" and str(tmp_path / "copy") in copy.stdout
    files = list(tmp_path.rglob("*.nb[ic]"))
    assert len(files) == 2
    for path in files:
        path.write_bytes(path.read_bytes()[:100])
    broken = process()
    assert broken.stdout == "eager\n" and broken.stderr.count("\n") == 1, broken.stderr
    assert "numba needs functions that can be compiled and cached" in broken.stderr
    assert process().stdout == "numba\n"
    next(tmp_path.rglob("*.nbc")).unlink()
    assert process().stderr.count("compiling CPU kernels") == 1
