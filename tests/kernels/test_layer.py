"""The step in plain PyTorch against the float64 oracle, and its operator.

In fp32 a step is some thirty roundings of 2^-25 on average, and sums over K and V of up to 64 terms; 1e-5 is ten times
what they make together. The oracle shares nothing with it.
"""

import pytest
import torch

from hf_gdn import ops, registry
from hf_gdn.kernels import STEP_KDA, layer, reference
from tests.tiny import assert_close

from .steps import FAMILIES, double

BUDGET = 1e-5


@pytest.fixture(params=FAMILIES)
def inputs(request):
    op, rule = FAMILIES[request.param]
    return op.make_inputs(B=2, T=3, HK=4 if op is STEP_KDA else 2, HV=4, K=12, V=20, **rule)


def first(raw, tokens):
    return type(raw)(*(x if x is None else x[:, :tokens] for x in raw))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_the_eager_step_is_the_oracles(inputs, tokens, width):
    raw, weights, window = first(inputs["raw"], tokens), inputs["weights"], inputs["window"]
    weights = weights._replace(conv=torch.randn(weights.conv.shape[0], width), conv_bias=torch.randn(len(weights.conv)))
    window = torch.randn(*window.shape[:2], width)
    wanted = reference.step(double(raw), double(weights), inputs["rule"], window.double(), inputs["state"].double())
    state = inputs["state"].clone()
    y = layer.step(raw, weights, inputs["rule"], window, state)
    for name, got, want in zip(("y", "window", "state"), (y, window, state), wanted):
        assert_close(name, got, want, BUDGET)


def test_the_operator_passes_opcheck(inputs):
    op = "step_kda" if inputs["raw"].a.dim() == 3 else "step_gdn"
    tensors = *inputs["raw"][:6], *inputs["weights"], inputs["window"], inputs["state"]
    tensors = [x if x is None else x.contiguous() for x in tensors]
    torch.library.opcheck(ops.STEP_OPERATORS[op], (*tensors, *inputs["rule"], "eager"))


def test_compiles_as_an_operator_without_a_break(inputs):
    """As a kernel that torch.compile cannot look into is called; in place."""
    op = "step_kda" if inputs["raw"].a.dim() == 3 else "step_gdn"
    kernel = registry.Kernel(op, "eager", layer.step, lambda request: None)

    def function(raw, window, state):
        return ops.launch_step(kernel, raw, inputs["weights"], inputs["rule"], window, state) + 1

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        window, state = inputs["window"].clone(), inputs["state"].clone()
        results.append((call(inputs["raw"], window, state), window, state))
    for name, got, want in zip(("y", "window", "state"), *results):
        assert_close(name, got, want, 1e-6)


def test_few_tokens_at_once_or_one_by_one(inputs):
    whole, parts = [inputs[name].clone() for name in ("window", "state")], []
    at_once = layer.step(inputs["raw"], inputs["weights"], inputs["rule"], *whole)
    window, state = inputs["window"].clone(), inputs["state"].clone()
    for t in range(3):
        raw = type(inputs["raw"])(*(x if x is None else x[:, t : t + 1] for x in inputs["raw"]))
        parts.append(layer.step(raw, inputs["weights"], inputs["rule"], window, state))
    for name, got, want in zip(("y", "window", "state"), (torch.cat(parts, 1), window, state), (at_once, *whole)):
        assert_close(name, got, want, BUDGET)
