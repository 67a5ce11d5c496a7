"""Kernels that prove themselves: planted faults, verdicts on disk, and launches that fail later."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from hf_gdn import log, operators, registry, verification
from hf_gdn.dispatch import dims_of
from hf_gdn.errors import BackendError
from hf_gdn.kernels.triton.runtime import INTERPRET
from hf_gdn.registry import Request
from hf_gdn.testing import assert_same
from hf_gdn.testing import calls as testing_calls
from hf_gdn.upstream import device_errors
from hf_gdn.verification import verdicts
from hf_gdn.verification.proofs import proofs
from hf_gdn.verification.trial import check

CPU = torch.device("cpu")
HEADS = (1, 2, 8, 8)
OPS = list(registry.ops())


def request(op: str, dtype: torch.dtype = torch.float32) -> Request:
    heads = (2, 2, 8, 8) if op.endswith("kda") or op == "gated_norm" else HEADS
    return Request(op, "cpu", dtype, *heads)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, without_numba):
    """Verdicts of this test alone, on disk and in memory, and warnings anew."""
    monkeypatch.setenv("HF_GDN_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_GDN_VERIFY", "1")
    monkeypatch.setattr(log, "warned", set())
    verification.forget()
    yield tmp_path / "verdicts"
    verification.forget()


@pytest.fixture
def plant():
    """Registers a checked copy of an eager kernel, its results changed, that "auto" takes before eager."""
    planted = []

    def make(op, change=lambda results: results, calls=None):
        eager = registry.get(op, "eager")

        def fn(*args, **kwargs):
            if calls is not None:
                calls.append(op)
            return change(eager.fn(*args, **kwargs))

        kernel = dataclasses.replace(eager, backend="planted", fn=fn, checked=True)
        planted.append(registry.register(kernel, before="eager"))
        return kernel

    registry.kernels()
    yield make
    for kernel in planted:
        registry.unregister(kernel.op, kernel.backend)


def scaled(results):
    """A wrong constant."""
    return tuple(x * 1.001 for x in results) if isinstance(results, tuple) else results * 1.001


def not_a_number(results):
    o = results[0] if isinstance(results, tuple) else results
    o.view(-1)[-1] = torch.nan
    return results


def raises(results):
    raise RuntimeError("Triton Error [CUDA]: invalid argument")


def out_of_resources(results):
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(300000, 232448, "shared memory")


FAULTS = {
    scaled: "error 1.0e-03 of o (packed, hard gates, equal keys), at most 2.0e-05 is right",
    not_a_number: "error inf of o",
    raises: "raised RuntimeError: Triton Error [CUDA]: invalid argument",
    out_of_resources: "raised OutOfResources: out of resource: shared memory, Required: 300000",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_a_right_kernel_passes(op, dtype):
    verdict = check(registry.get(op, "eager"), request(op, dtype), CPU)
    assert verdict.refused is None and verdict.seconds > 0
    assert len({name.partition(":")[0] for name in verdict.errors}) == len(proofs(request(op)))


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_constant_is_found_in_every_op(op, plant):
    kernel = plant(op, lambda results: results * 1.001 if isinstance(results, torch.Tensor) else spoiled(results))
    refused = check(kernel, request(op), CPU).refused
    assert refused is not None and "at most" in refused


def spoiled(results):
    """Only the second result is wrong: of a prologue k, of a delta rule the final state."""
    first, second, *rest = results
    made = (first, second * 1.001, *rest)
    return type(results)(*made) if hasattr(results, "_fields") else made


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_faulty_kernel_is_refused_and_the_next_one_serves(fault, plant, caplog):
    if fault is out_of_resources:
        pytest.importorskip("triton")
    calls: list[str] = []
    kernel = plant("chunk_gdn", fault, calls)
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        served = [registry.resolve(request("chunk_gdn")).backend for _ in range(3)]
    assert served == ["eager"] * 3
    warnings = [text for text in caplog.messages if "planted" in text]
    assert len(warnings) == 1 and "planted failed its check on cpu: chunk_gdn, " in warnings[0]
    assert FAULTS[fault] in warnings[0]
    ran = len(calls)
    with pytest.raises(BackendError, match="cannot serve chunk_gdn: failed its check on cpu"):
        registry.resolve(request("chunk_gdn"), "planted")
    verification.forget()  # as a second process
    registry.resolve(request("chunk_gdn"))
    assert len(calls) == ran, "a second process checked again"
    assert verification.why_not(kernel, Request("chunk_gdn", "cpu", torch.float32, 1, 1, 8, 8)) and len(calls) > ran


def test_a_verdict_belongs_to_a_kind_of_call(plant, folder):
    calls: list[str] = []
    kernel = plant("recurrent_gdn", calls=calls)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert registry.resolve(request("recurrent_gdn", dtype)) is kernel
    assert len(calls) == 2 * 2  # proofs of two dtypes
    assert registry.resolve(Request("recurrent_gdn", "cpu", torch.float32, 2, 2, 8, 8)) is kernel
    assert len(calls) == 3 * 2 and len(list(folder.glob("*.json"))) == 3
    kept = json.loads(next(folder.glob("*.json")).read_text())
    assert kept["refused"] is None and kept["key"]["torch"] == torch.__version__ and len(kept["key"]["source"]) == 32


def test_another_default_device(plant):
    kernel = plant("recurrent_gdn")
    with torch.device("meta"):
        assert registry.resolve(request("recurrent_gdn")) is kernel


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1, "refused": null}', "\0" * 50])
def test_a_corrupted_verdict_is_made_again(content, plant, folder):
    calls: list[str] = []
    plant("gated_norm", calls=calls)
    registry.resolve(request("gated_norm"))
    file = next(folder.glob("*.json"))
    whole = json.loads(file.read_text())
    file.write_text(content)
    verification.forget()
    assert registry.resolve(request("gated_norm")).backend == "planted" and len(calls) == 2
    assert json.loads(file.read_text())["key"] == whole["key"]


def test_a_folder_that_cannot_be_written_costs_a_check_each_process(plant, folder, caplog):
    folder.parent.joinpath("verdicts").write_text("a file where the folder should be")
    calls: list[str] = []
    plant("gated_norm", calls=calls)
    with caplog.at_level(logging.INFO, "hf_gdn"):
        assert registry.resolve(request("gated_norm")).backend == "planted"
    assert "could not be kept" in caplog.text
    verification.forget()
    assert registry.resolve(request("gated_norm")).backend == "planted" and len(calls) == 2


def test_modes(plant, folder, monkeypatch):
    calls: list[str] = []
    plant("gated_norm", scaled, calls)
    monkeypatch.setenv("HF_GDN_VERIFY", "0")
    assert registry.resolve(request("gated_norm")).backend == "planted" and not calls and not folder.exists()
    monkeypatch.setenv("HF_GDN_VERIFY", "off")
    assert registry.resolve(request("gated_norm")).backend == "planted" and not calls
    monkeypatch.setenv("HF_GDN_VERIFY", "always")
    for ran in (1, 2):
        assert registry.resolve(request("gated_norm")).backend == "eager" and len(calls) == ran
        verification.forget()
    monkeypatch.setenv("HF_GDN_VERIFY", "never")
    with pytest.raises(ValueError, match="HF_GDN_VERIFY must be one of 0, 1, always, got 'never'"):
        registry.resolve(request("gated_norm"))


_PROCESS = """
import dataclasses, torch
from hf_gdn import registry
from hf_gdn.registry import Request
for kernel in registry.kernels():
    if kernel.backend == "numba":
        registry.unregister(kernel.op, kernel.backend)
eager = registry.get("chunk_gdn", "eager")
def fn(**call):
    o, state = eager.fn(**call)
    return o * 1.001, state
registry.register(dataclasses.replace(eager, backend="planted", fn=fn, checked=True), before="eager")
for _ in range(2):
    print(registry.resolve(Request("chunk_gdn", "cpu", torch.float32, 1, 2, 8, 8)).backend)
"""


def test_two_processes_at_once(folder):
    both = [
        subprocess.Popen([sys.executable, "-c", _PROCESS], stdout=subprocess.PIPE, text=True, env=os.environ.copy())
        for _ in range(2)
    ]
    for process in both:
        assert process.communicate(timeout=300)[0].split() == ["eager", "eager"] and process.returncode == 0
    assert all(json.loads(file.read_text())["refused"] for file in folder.glob("*.json"))
    assert not list(folder.glob(".*.tmp"))


def resolved(asked):
    return registry.resolve_cached(asked.op, asked.device_type, asked.dtype, asked.dims, "auto").backend


def test_another_thread_waits_for_the_check(plant):
    started, answered, served = threading.Event(), threading.Event(), []

    def slow(results):
        started.set()
        answered.wait(0.3)
        return scaled(results)

    def ask():
        started.wait()
        served.append(resolved(request("gated_norm")))
        answered.set()

    plant("gated_norm", slow)
    other = threading.Thread(target=ask)
    other.start()
    assert registry.resolve(request("gated_norm")).backend == "eager"
    other.join()
    assert served == ["eager"] and resolved(request("gated_norm")) == "eager"


def test_choices_made_inside_of_a_check_are_forgotten_when_it_refuses(plant):
    inside = []

    def asks(results):
        inside.append(resolved(request("gated_norm")))
        return scaled(results)

    plant("gated_norm", asks)
    assert registry.resolve(request("gated_norm")).backend == "eager"
    assert inside == ["planted"] and resolved(request("gated_norm")) == "eager"


def test_a_kernel_that_breaks_the_device_is_refused_by_the_next_process(plant, monkeypatch):
    def broken(results):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    plant("gated_norm", broken)
    for module in ("hf_gdn.verification", "hf_gdn.verification.trial"):
        monkeypatch.setattr(f"{module}.is_sticky", lambda error, device: True)
    with pytest.raises(RuntimeError, match=r"gated_norm .*left cpu unusable for this process.*Start again"):
        registry.resolve(request("gated_norm"))
    verification.forget()
    assert registry.resolve(request("gated_norm")).backend == "eager"


@pytest.mark.parametrize("place", ["kernel", "oracle"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_check_without_memory_or_disk_space_leaves_no_verdict(place, error, plant, folder, monkeypatch, caplog):
    short = [error]

    def fails(results):
        if short:
            raise short[0]
        return results

    reference = testing_calls.reference
    kernel = plant("gated_norm", fails if place == "kernel" else lambda results: results)
    if place == "oracle":
        monkeypatch.setattr(testing_calls, "reference", lambda *call: fails(reference(*call)))
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        assert registry.resolve(request("gated_norm")).backend == "eager" and not folder.exists()
    assert "planted could not be checked: " in caplog.text
    short.clear()
    assert registry.resolve(request("gated_norm")) is kernel


def test_nothing_is_checked_while_a_graph_is_captured(plant, monkeypatch):
    kernel = plant("gated_norm")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(verdicts, "model_of", lambda device: "a card")
    with pytest.raises(BackendError, match="run the same call once before the capture"):
        verification.verdict_of(kernel, request("gated_norm"), torch.device("cuda"))


def test_every_model_of_card_is_checked(monkeypatch):
    models = ["small", "small", "large"]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(verdicts, "model_of", lambda device: models[device.index])
    assert verification._devices("cuda") == [torch.device("cuda", 1), torch.device("cuda", 2)]


def test_compiled_code_is_checked_before_it_is_traced(plant):
    calls: list[str] = []
    kernel = plant("chunk_gdn", calls=calls)
    inputs = registry.ops()["chunk_gdn"].make_inputs(T=5, HK=1, HV=2, K=8, V=8)
    tensors = [inputs.pop(name) for name in ("q", "k", "v", "g", "beta")]

    @torch.compile(fullgraph=True, backend="eager")
    def run(*tensors):
        dims = dims_of(tensors[0], tensors[2])
        chosen = registry.resolve_cached("chunk_gdn", "cpu", tensors[0].dtype, dims, "auto")
        return operators.call_delta_rule(chosen, *tensors, **inputs)[0]

    assert_same("o", run(*tensors), kernel.fn(*tensors, **inputs)[0])
    assert len(calls) >= 3  # two proofs, and the call


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("op", "heads"),
    [
        *((op, None) for op in OPS),
        ("chunk_gdn", (2, 4, 32, 32)),
        ("backward_gdn", (2, 4, 32, 32)),
        ("backward_kda", (2, 2, 32, 32)),
        pytest.param("backward_gdn", (2, 4, 128, 128), marks=pytest.mark.extended),
    ],
)
def test_the_triton_kernels_pass(op, heads):
    asked = request(op, torch.bfloat16) if heads is None else Request(op, "cpu", torch.bfloat16, *heads)
    verdict = check(registry.get(op, "triton"), asked, CPU)
    assert verdict.refused is None and verdict.errors


# ------------------------------------------------------------------------------------------------ launches that fail


@pytest.fixture
def failing(plant):
    """A kernel that passes its check and cannot be launched afterwards."""
    pytest.importorskip("triton")
    state = {"fails": False}
    kernel = plant("recurrent_gdn", lambda results: out_of_resources(results) if state["fails"] else results)
    for dtype in (torch.float32, torch.float64):
        assert registry.resolve(request("recurrent_gdn", dtype)) is kernel
    state["fails"] = True
    return kernel


def call_of(kernel, asked="auto"):
    inputs = registry.ops()["recurrent_gdn"].make_inputs(T=1, HK=1, HV=2, K=8, V=8)
    return inputs, lambda: operators.call_delta_rule(kernel, **inputs, asked=asked)


def test_a_launch_that_fails_later_is_served_by_the_next_backend(failing, caplog):
    inputs, call = call_of(failing)
    wanted = registry.get("recurrent_gdn", "eager").fn(**inputs)
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        for got, expected in zip(call(), wanted):
            assert_same("result", got, expected)
    assert "planted could not be launched: OutOfResources: out of resource: shared memory" in caplog.text
    assert registry.resolve(request("recurrent_gdn")).backend == "eager"
    assert registry.resolve(request("recurrent_gdn", torch.float64)).backend == "planted", "another kind of call"


@pytest.mark.parametrize("options", [{"beta_max": 2.0}, {"needs_grad": True}], ids=str)
def test_the_next_backend_is_asked_for_the_same_call(options, failing):
    """Its refusals of a larger beta hold after a failed launch too, and gradients take a kernel that has them."""
    eager, called = registry.get("recurrent_gdn", "eager"), []

    def fn(*args, **kwargs):
        called.append(kwargs)
        return eager.fn(*args, **kwargs)

    def why_not(request):
        return "refuses such a beta" if request.beta_max > 1 else None

    second = dataclasses.replace(eager, backend="second", fn=fn, why_not=why_not, differentiable=False)
    registry.register(second, before="eager")
    try:
        operators.call_delta_rule(failing, **call_of(failing)[0], **options)
    finally:
        registry.unregister("recurrent_gdn", "second")
    assert not called


def test_a_backend_asked_for_by_name_raises(failing):
    with pytest.raises(BackendError, match="backend 'planted' cannot serve recurrent_gdn: could not be launched"):
        call_of(failing, "planted")[1]()


def test_the_operators_of_compiled_code_know_what_was_asked_for(failing):
    """A kernel that was chosen by "auto" is named in compiled code, and yet has a next backend."""
    call = registry.ops()["recurrent_gdn"].make_inputs(T=3, HK=1, HV=2, K=8, V=8)
    wanted = registry.get("recurrent_gdn", "eager").fn(**call)
    tensors = *(call[name] for name in ("q", "k", "v", "g", "beta", "initial_state")), None

    def run(asked):
        return operators.OPERATORS["recurrent_gdn"](*tensors, call["scale"], False, 1.0, "planted", asked)

    for got, expected in zip(run("auto"), wanted):
        assert_same("result", got, expected)
    verification.forget()
    registry.forget_choices()
    with pytest.raises(BackendError, match="backend 'planted' cannot serve recurrent_gdn"):
        run("planted")


@pytest.mark.parametrize(
    ("error", "launch", "sticky", "transient"),
    [
        (RuntimeError("Triton Error [CUDA]: out of memory"), True, False, True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False, True, False),
        (RuntimeError("CUDA error: device-side assert triggered"), False, True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False, False, True),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), True, False, False),
        (RuntimeError("out of resource: shared memory"), False, False, False),
        (ValueError("cu_seqlens must start at 0"), False, False, False),
        (subprocess.CalledProcessError(1, "gcc"), True, False, False),
    ],
)
def test_which_errors_are_of_one_launch(error, launch, sticky, transient, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    assert device_errors.is_launch_failure(error) is launch
    assert device_errors.is_sticky(error, torch.device("cuda")) is sticky
    assert device_errors.is_transient(error) is transient


@pytest.mark.parametrize("blocking", [False, True])
def test_a_device_lost_after_the_check(blocking, plant, folder, monkeypatch, caplog):
    """The launch that reports an error need not be the one that caused it, unless launches block."""
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", str(int(blocking)))
    lost = []

    def fails(results):
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return results

    kernel = plant("recurrent_gdn", fails)
    assert registry.resolve(request("recurrent_gdn")) is kernel
    lost.append(True)
    with pytest.raises(RuntimeError, match="^CUDA error: an illegal memory access was encountered$"):
        call_of(kernel)[1]()
    assert "cannot use cpu any more" in caplog.text
    assert ("refused for such calls from the next process" if blocking else "CUDA_LAUNCH_BLOCKING=1") in caplog.text
    (kept,) = (json.loads(file.read_text())["refused"] for file in folder.glob("*.json"))
    assert (kept or "").startswith("left the device unusable") is blocking


def test_a_kernel_that_cannot_be_launched_with_slots_is_refused():
    pytest.importorskip("triton")
    eager = registry.get("step_gdn", "eager")
    kernel = dataclasses.replace(
        eager, backend="planted", fn=lambda *args, **call: out_of_resources(args), slots=True, checked=True
    )
    refused = verification.why_not_in_slots(kernel, request("step_gdn"), CPU)
    assert refused.startswith("failed its check with states in slots: raised OutOfResources: out of resource")


def test_other_errors_are_raised_as_they_are(plant):
    state = {"error": None}

    def fails(results):
        if state["error"] is not None:
            raise state["error"]
        return results

    kernel = plant("recurrent_gdn", fails)
    registry.resolve(request("recurrent_gdn"))
    for state["error"] in (
        ValueError("of the caller"),
        torch.OutOfMemoryError("CUDA out of memory"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(state["error"])):
            call_of(kernel)[1]()
    state["error"] = None
    assert registry.resolve(request("recurrent_gdn")) is kernel
