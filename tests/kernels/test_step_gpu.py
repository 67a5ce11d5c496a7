"""The step kernels on a GPU, at the shapes and dtypes of real layers. Budgets as in `test_step_interpreted`."""

import pytest
import torch

from hf_gdn.kernels.triton import step as module

from .test_step_interpreted import BUDGET, FAMILIES, check, make

pytestmark = pytest.mark.gpu

DIMS = {  # HK, HV, K, V
    "qwen3_next": (16, 32, 128, 128),
    "olmo_hybrid": (30, 30, 96, 192),
    "kimi_linear": (32, 32, 128, 128),
}


def inputs(family, B, T, dtype=torch.bfloat16, **kwargs):
    return make(family, (B, T, *DIMS.get(family, DIMS["kimi_linear"]), 4), dtype=dtype, device="cuda", **kwargs)


@pytest.mark.parametrize("T", [1, 4, 16])
@pytest.mark.parametrize("B", [1, 8, 32])
@pytest.mark.parametrize("family", DIMS)
def test_shapes(family, B, T):
    check(inputs(family, B, T))


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_dtypes(family, dtype):
    check(inputs(family, 2, 3, dtype))


@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_widths(width):
    check(make("qwen3_next", (2, 3, *DIMS["qwen3_next"], width), dtype=torch.bfloat16, device="cuda", bias=True))


def test_bits_do_not_depend_on_batch_run_or_split():
    whole_inputs = inputs("qwen3_next", 160, 4)
    whole = check(whole_inputs)
    assert all(torch.equal(x, y) for x, y in zip(check(whole_inputs), whole))
    for B in (1, 32):
        projected = type(whole_inputs["projected"])(*(x if x is None else x[:B] for x in whole_inputs["projected"]))
        few = {
            **whole_inputs,
            "projected": projected,
            **{name: whole_inputs[name][:B] for name in ("conv_state", "state")},
        }
        assert all(torch.equal(x, y[:B]) for x, y in zip(check(few), whole))
    conv_state, state, parts = whole_inputs["conv_state"].clone(), whole_inputs["state"].clone(), []
    for t in range(4):
        projected = type(whole_inputs["projected"])(
            *(x if x is None else x[:, t : t + 1] for x in whole_inputs["projected"])
        )
        parts.append(module.step(projected, whole_inputs["weights"], whole_inputs["spec"], conv_state, state))
    assert all(torch.equal(x, y) for x, y in zip((torch.cat(parts, 1), conv_state, state), whole))


def test_nothing_is_written_beside_the_states():
    """Rows before and after those of the call stay what they are."""
    given = inputs("qwen3_next", 3, 2)
    conv_state, state = (
        torch.full_like(x.repeat(3, *(1,) * (x.dim() - 1)), torch.nan) for x in (given["conv_state"], given["state"])
    )
    conv_state[3:6], state[3:6] = given["conv_state"], given["state"]
    module.step(given["projected"], given["weights"], given["spec"], conv_state[3:6], state[3:6])
    for x in (conv_state, state):
        assert x[:3].isnan().all() and x[6:].isnan().all() and x[3:6].isfinite().all()


def test_in_a_cuda_graph():
    """Replays move the same states on."""
    given = inputs("kimi_linear", 2, 1)
    conv_state, state = given["conv_state"].clone(), given["state"].clone()
    wanted = [module.step(given["projected"], given["weights"], given["spec"], conv_state, state) for _ in range(3)]
    again, states = given["conv_state"].clone(), given["state"].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module.step(given["projected"], given["weights"], given["spec"], again, states)
    for want in wanted:
        graph.replay()
        assert torch.equal(y, want)
    assert torch.equal(again, conv_state) and torch.equal(states, state)
