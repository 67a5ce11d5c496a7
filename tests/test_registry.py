"""Which kernel serves, and what the refusals say."""

import dataclasses
import logging
import os
import re
import subprocess
import sys
import sysconfig

import pytest
import torch

from hf_gdn import log, patches, registry
from hf_gdn.errors import BackendError
from hf_gdn.kernels.numba import library
from hf_gdn.kernels.triton import runtime
from hf_gdn.registry import Kernel, Request
from tests import tiny_models as tiny

REQUEST = Request("chunk_gdn", "cpu", torch.float32, 2, 4, 64, 64)


@pytest.fixture
def extra():
    """A kernel of a backend "extra" that is taken out again."""
    kernel = Kernel("chunk_gdn", "extra", lambda **kwargs: "extra", lambda request: None)
    yield kernel
    if kernel in registry.kernels("chunk_gdn"):
        registry.unregister("chunk_gdn", "extra")


def test_every_op_has_an_oracle_inputs_and_an_eager_kernel():
    output, state, conv_state = (1, 3, 2, 4), (1, 2, 4, 4), (1, 24, 4)
    shapes = {  # of the first and the last result
        **dict.fromkeys(tiny.DELTA_RULES, (output, state)),
        **dict.fromkeys(("step_gdn", "step_kda"), (output, state)),
        **dict.fromkeys(("prologue_gdn", "prologue_kda"), (output, conv_state)),
        "gated_norm": (output, output),
    }
    shapes |= dict.fromkeys(("backward_gdn", "backward_kda"), (output, state))
    shapes |= dict.fromkeys(("backward_prologue_gdn", "backward_prologue_kda"), ((1, 3, 24), None))
    shapes["backward_gated_norm"] = output, (4,)
    assert set(registry.ops()) == set(shapes)
    for name, op in registry.ops().items():
        assert registry.get(name, "eager").why_not(dataclasses.replace(REQUEST, op=name)) is None
        made = op.reference(**op.make_inputs(T=3, K=4, V=4))
        made = made if isinstance(made, tuple) else (made,)
        assert (made[0].shape, getattr(made[-1], "shape", None)) == shapes[name], name


def test_declared_order():
    for op in registry.ops():
        fla = ["fla"] if op in tiny.DELTA_RULES else []
        order = ["triton", *fla, *([] if op.startswith("backward") else ["numba"]), "eager"]
        assert [kernel.backend for kernel in registry.kernels(op)] == order


@pytest.fixture
def no_numba(monkeypatch):
    """As if numba were not installed."""
    sentence = "needs the numba package, which makes CPUs faster and is not installed: pip install 'hf-gdn[cpu]'"
    monkeypatch.setattr(library, "_verdicts", dict.fromkeys((torch.float32, torch.float64), sentence))
    monkeypatch.setattr(registry, "_chosen", {})


def test_auto_takes_the_first_that_serves_and_warns_once(caplog, monkeypatch, no_numba):
    monkeypatch.setattr(log, "warned", set())
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        assert registry.resolve(REQUEST).backend == "eager"
        assert registry.resolve(REQUEST).backend == "eager"
    assert len(caplog.messages) == 1
    assert "eager" in caplog.text and "pip install 'hf-gdn[cpu]'" in caplog.text


def test_auto_does_not_warn_where_the_kernel_is_a_fast_one(caplog, monkeypatch, extra):
    monkeypatch.setattr(log, "warned", set())
    registry.register(dataclasses.replace(extra, fast_on=("cpu",)), before="numba")
    try:
        with caplog.at_level(logging.WARNING, "hf_gdn"):
            assert registry.resolve(REQUEST).backend == "extra"
    finally:
        registry.unregister("chunk_gdn", "extra")
    assert caplog.messages == []


def test_refusals_are_one_sentence_each():
    for kernel in registry.kernels():
        if kernel.backend not in ("numba", "eager"):
            sentence = kernel.why_not(dataclasses.replace(REQUEST, op=kernel.op))
            assert sentence.startswith("needs") and "\n" not in sentence


def test_triton_refuses_where_its_launchers_cannot_be_compiled(monkeypatch, tmp_path):
    """At a first launch Triton runs a C compiler, with Python's headers."""
    request = dataclasses.replace(REQUEST, device_type="cuda")
    serves = registry.get("chunk_gdn", "triton").why_not
    try:
        for change, sentence in (
            (lambda: monkeypatch.setenv("CC", "no-such-compiler"), "needs a C compiler .*no-such-compiler"),
            (
                lambda: (monkeypatch.delenv("CC"), monkeypatch.setenv("PATH", str(tmp_path))),
                "gcc or clang is not on PATH",
            ),
            (
                lambda: (
                    monkeypatch.setenv("CC", sys.executable),
                    monkeypatch.setattr(sysconfig, "get_paths", lambda _: {"include": str(tmp_path)}),
                ),
                "needs Python's headers .*Python.h",
            ),
        ):
            change()
            runtime.missing_build_tool.cache_clear()
            assert re.search(sentence, serves(request))
    finally:
        runtime.missing_build_tool.cache_clear()


def test_a_backend_asked_for_by_name_never_falls_back():
    with pytest.raises(BackendError, match=r"backend 'triton' cannot serve chunk_gdn: needs .*cpu"):
        registry.resolve(REQUEST, "triton")


def test_when_no_backend_serves_each_says_why():
    with pytest.raises(
        BackendError, match=r"no backend serves chunk_gdn: triton .*; fla .*; numba .*; eager serves floating"
    ):
        registry.resolve(dataclasses.replace(REQUEST, dtype=torch.int8))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: registry.resolve(REQUEST, "cuda"),
            "unknown backend 'cuda'; valid backends: auto, triton, fla, numba, eager",
        ),
        (lambda: registry.kernels("conv"), "unknown op 'conv'; registered ops: chunk_gdn"),
        (lambda: registry.register_op(registry.ops()["chunk_gdn"]), "op 'chunk_gdn' is registered already"),
        (lambda: registry.register(registry.get("chunk_gdn", "eager")), "has a kernel of backend 'eager' already"),
        (lambda: registry.register(dataclasses.replace(registry.get("chunk_gdn", "eager"), op="x")), "is for op 'x'"),
    ],
    ids=["backend", "op", "duplicate_op", "duplicate_kernel", "kernel_of_no_op"],
)
def test_errors_name_what_is_valid(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_a_kernel_can_go_ahead_of_others(extra):
    with pytest.raises(ValueError, match="before='nobody'"):
        registry.register(extra, before="nobody")
    registry.register(extra, before="triton")
    assert registry.kernels("chunk_gdn")[0] is extra
    assert registry.resolve(REQUEST) is extra
    dims = (2, 4, 64, 64)
    assert registry.resolve_cached("chunk_gdn", "cpu", torch.float32, dims, "auto", False) is extra
    registry.unregister("chunk_gdn", "extra")
    assert registry.resolve_cached("chunk_gdn", "cpu", torch.float32, dims, "auto", False) is not extra


def test_gradients_go_to_the_eager_backend(extra):
    registry.register(extra)
    assert registry.resolve(REQUEST, "extra", needs_grad=True).backend == "eager"
    assert registry.resolve(REQUEST, "extra").backend == "extra"


PLUGIN = """
import dataclasses
from hf_gdn import log, patches, registry

def load():
    eager = registry.get("chunk_gdn", "eager")
    registry.register(dataclasses.replace(eager, backend="plugin"), before="triton")
"""


def test_packages_add_kernels_through_an_entry_point(tmp_path):
    (tmp_path / "some_plugin.py").write_text(PLUGIN)
    info = tmp_path / "some_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hf_gdn.kernels]\nplugin = some_plugin:load\n")
    code = "from hf_gdn import registry; print([k.backend for k in registry.kernels('chunk_gdn')])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['plugin', 'triton', 'fla', 'numba', 'eager']"


def test_environment_names_the_default_backend():
    code = (
        "from hf_gdn import registry as r; import torch; r.resolve(r.Request('chunk_gdn','cpu',torch.float32,1,1,8,8))"
    )
    env = {**os.environ, "HF_GDN_BACKEND": "fla"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "backend 'fla' cannot serve chunk_gdn" in out.stderr


EARLY = """
import sys
from hf_gdn import registry

def register(op, backend, before=None):
    kernel = registry.Kernel(op, backend, lambda **kwargs: None, lambda request: None)
    registry.register(kernel, before=before)

"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", EARLY + code], capture_output=True, text=True)


def test_registering_imports_no_kernel():
    out = run("register('chunk_gdn', 'mine'); print([m for m in sys.modules if m.startswith('hf_gdn.kernels')])")
    assert out.stdout.strip() == "[]", out.stderr


def test_kernels_registered_before_the_built_in_ones_keep_their_place():
    out = run("""
register("chunk_gdn", "last")
register("chunk_gdn", "mine", before="eager")
register("chunk_gdn", "first", before="mine")
import hf_gdn.kernels.eager.chunk_gdn  # whose kernel then waits as well
print([kernel.backend for kernel in registry.kernels("chunk_gdn")])
""")
    assert out.stdout.strip() == "['triton', 'fla', 'numba', 'first', 'mine', 'eager', 'last']", out.stderr


def test_kernels_registered_before_the_built_in_ones_are_checked_at_the_first_question():
    out = run("register('conv', 'mine'); registry.backends()")
    assert "kernel 'mine' is for op 'conv'; registered ops: chunk_gdn" in out.stderr
    out = run("register('chunk_gdn', 'eager'); registry.backends()")
    assert "op 'chunk_gdn' has a kernel of backend 'eager' already" in out.stderr


@pytest.mark.parametrize(
    ("backend", "op", "dtype", "beta_max", "hip", "refused"),
    [
        ("triton", "chunk_gdn", torch.bfloat16, 2.0, None, "is inaccurate in 16 bits for beta up to 2"),
        ("triton", "chunk_kda", torch.float16, 2.0, "6.0", "is inaccurate in 16 bits for beta up to 2"),
        ("triton", "chunk_gdn", torch.float32, 1.0, None, "serves prompts in fp32 on AMD cards only"),
        ("triton", "chunk_kda", torch.float32, 2.0, "6.0", None),
        ("triton", "chunk_gdn", torch.bfloat16, 1.0, None, None),
        ("triton", "recurrent_gdn", torch.bfloat16, 2.0, None, None),
        ("triton", "recurrent_gdn", torch.float32, 1.0, None, None),
        ("fla", "chunk_gdn", torch.bfloat16, 2.0, None, "is not checked in 16 bits for beta up to 2"),
        ("fla", "chunk_kda", torch.float16, 2.0, None, "is not checked in 16 bits for beta up to 2"),
        ("fla", "chunk_gdn", torch.float32, 2.0, None, None),
        ("fla", "recurrent_gdn", torch.bfloat16, 2.0, None, None),
    ],
)
def test_what_chunk_kernels_refuse(backend, op, dtype, beta_max, hip, refused, monkeypatch):
    monkeypatch.setattr(runtime, "HAS_TRITON", True)
    monkeypatch.setattr(runtime, "missing_build_tool", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = registry.get(op, backend).why_not(Request(op, "cuda", dtype, 2, 4, 64, 64, beta_max))
    assert (found or "").startswith(refused or "") and (found is None) == (refused is None)


def test_models_whose_beta_exceeds_one_say_so():
    """OLMo-Hybrid doubles beta, which its layers' requests have to tell."""
    found = {}
    for name in ("olmo_hybrid", "qwen3_next"):
        if name in tiny.CONFIGS:
            found[name] = patches.all_families()[name].spec(tiny.mixer(tiny.model(name))).beta_scale
    assert found == {"olmo_hybrid": 2.0, "qwen3_next": 1.0}
