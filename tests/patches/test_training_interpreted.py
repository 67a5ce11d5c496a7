"""Training of patched layers on the Triton kernels, in the interpreter: what runs, and that gradients are right."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hf_gdn
from hf_gdn import patches
from hf_gdn.kernels.triton.runtime import INTERPRET
from hf_gdn.testing import assert_same
from hf_gdn.testing.tolerances import GRADIENT
from tests import tiny_models as tiny
from tests.patches.layer_runs import PRODUCTS, ComputedOperators, launched

pytestmark = [pytest.mark.interpret, pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")]

# Key heads shared by value heads and interleaved projections; KDA; beta up to 2, K != V and separate projections.
NAMES = ("qwen3_next", "kimi_linear", "olmo_hybrid")
some = pytest.mark.parametrize("family", NAMES)


def first(count):
    """Without --all the first few of them."""
    others = [pytest.param(name, marks=pytest.mark.extended) for name in NAMES[count:]]
    return pytest.mark.parametrize("family", [*NAMES[:count], *others])


FORWARD = {"gdn": 4, "kda": 6}  # prologue, the chunk op's, norm
AROUND = [
    *("_gated_norm_gradients_kernel", "_sum_kernel"),
    *("_convolution_gradients_kernel", "_gate_gradients_kernel"),
    *("_transposed_convolution_kernel", "_weight_gradients_kernel"),
]
BACKWARD = {"gdn": 5, "kda": 7}  # the chunk op's
ZEROS = ["zeros"] * 3  # of two results without gradients and of the final state
OTHERS = {
    "qwen3_next": ["add", "cat", "stack", *ZEROS],
    "olmo_hybrid": [*["add"] * 5, *ZEROS],
    "kimi_linear": [*["add"] * 5, *ZEROS],
}


@pytest.fixture
def layer(family):
    return tiny.mixer(tiny.model(family))


def on_triton(family):
    return hf_gdn.patched(family, backend="triton", strict=True)


def gradients(layer, x, leaves=None, **kwargs):
    """Of a weighted sum of squares, by name; of x and of all parameters by default."""
    x = x.clone().requires_grad_(leaves is None)
    leaves = dict(layer.named_parameters(), x=x) if leaves is None else leaves
    out = layer(x, **kwargs)
    loss = (out.square() * torch.linspace(0.5, 1.5, out.shape[-1])).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()])))


def check(got, wanted):
    # Gates' gradients are remainders of terms that cancel, as in test_models.py.
    whole = torch.cat([x.flatten() for x in wanted.values()]).norm()
    for name, x in wanted.items():
        off = (got[name] - x).norm()
        assert off <= GRADIENT * x.norm() + 1e-7 * whole, f"gradient of {name}: off by {off:.1e} of {whole:.1e}"


@pytest.mark.parametrize("trained", ["all", "gates"])
@some
def test_gradients_are_the_originals(family, layer, trained, monkeypatch):
    """Everything between the projections is a fixed number of launches. Also where only the gates are trained, against
    eager: of their small gradients the original's rounding leaves less than the tolerance asks for."""
    x, leaves, variant = torch.randn(1, 70, 32), None, patches.all_families()[family].variant
    if trained == "gates":
        leaves = {n: p for n, p in layer.named_parameters() if n.rpartition(".")[2] in ("A_log", "dt_bias")}
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name in leaves)
    with hf_gdn.unpatched() if trained == "all" else hf_gdn.patched(family, backend="eager"):
        wanted = gradients(layer, x, leaves)
    launches = launched(monkeypatch)
    with on_triton(family):
        got = gradients(layer, x, leaves)
    check(got, wanted)
    assert len(launches) == FORWARD[variant] + BACKWARD[variant] + len(AROUND), launches
    assert launches[FORWARD[variant] :][:2] == AROUND[:2] and launches[-4:] == AROUND[2:]


@some
def test_a_training_step_computes_little_else(family, layer, monkeypatch):
    """Beside launches and products: gradients that nobody gave, the sum of what projections give for x, and joining the
    gradients of views of one projection."""
    launched(monkeypatch)  # what the interpreter computes is none of ours
    x, variant = torch.randn(1, 20, 32, requires_grad=True), patches.all_families()[family].variant
    with on_triton(family):
        out = layer(x)
        ones = torch.ones_like(out)
        with ComputedOperators() as seen:
            torch.autograd.grad(out, [x, *layer.parameters()], ones)
    products = [name for name in seen.names if name in ("mm", "addmm", "bmm")]
    ours = ("mm", "addmm", "bmm", "backward_gated_norm", f"backward_{variant}", f"backward_prologue_{variant}")
    others = [name for name in seen.names if name not in ours]
    assert len(products) == 2 * PRODUCTS[family], seen.names
    assert sorted(others) == OTHERS[family]


@first(2)
def test_padding_anywhere(family, layer):
    """Gradients are those of the rows alone, and what is hidden has none."""
    x, mask = torch.randn(2, 30, 32), torch.ones(2, 30, dtype=torch.long)
    mask[0, :9], mask[0, 27:] = 0, 0
    with on_triton(family):
        got = gradients(layer, x * mask[..., None], attention_mask=mask)
    rows = [gradients(layer, x[row : row + 1, mask[row] == 1]) for row in range(2)]
    wanted = {name: sum(row[name] for row in rows) for name in got if name != "x"}
    wanted["x"] = torch.zeros_like(x)
    for row in range(2):
        wanted["x"][row, mask[row] == 1] = rows[row]["x"][0]
    check(got, wanted)
    assert not got["x"][mask == 0].any()


@first(2)
def test_packed_sequences(family, layer):
    """One of them is empty, two are shorter than the window; another starts a chunk."""
    x, bounds = torch.randn(1, 40, 32), [0, 2, 3, 3, 40]
    with on_triton(family):
        got = gradients(layer, x, cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32))
    parts = [gradients(layer, x[:, a:b]) for a, b in pairwise(bounds) if a < b]
    wanted = {name: sum(part[name] for part in parts) for name in got if name != "x"}
    check(got, wanted | dict(x=torch.cat([part["x"] for part in parts], 1)))


@pytest.mark.parametrize("how", ["reentrant", "non_reentrant", "compiled"])
@first(1)
def test_checkpointed_and_compiled(family, layer, how):
    x = torch.randn(1, 20, 32)
    with on_triton(family):
        wanted = gradients(layer, x)
        if how == "compiled":
            check(gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"), x), {
                **{f"_orig_mod.{name}": y for name, y in wanted.items() if name != "x"}, "x": wanted["x"]
            })  # fmt: skip
            torch._dynamo.reset()
            return
        leaf = x.clone().requires_grad_()
        out = checkpoint(layer, leaf, use_reentrant=how == "reentrant")
        (out.square() * torch.linspace(0.5, 1.5, out.shape[-1])).sum().backward()
    for name, y in dict(layer.named_parameters(), x=leaf).items():
        assert_same(name, y.grad, wanted[name])


@first(1)
def test_same_bits_every_run(family, layer):
    x = torch.randn(2, 20, 32)
    with on_triton(family):
        first, second = gradients(layer, x), gradients(layer, x)
    for name, y in first.items():
        assert_same(name, second[name], y)
