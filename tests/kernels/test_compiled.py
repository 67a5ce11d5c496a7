"""The Triton kernels compiled for cards that need not be there: shared memory within the limit, and no spills.

What is compiled is what the launchers launch, with the arguments that they launch it with (`launches`).
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_gdn import registry
from hf_gdn.kernels.triton.runtime import HAS_TRITON, INTERPRET

if INTERPRET or not HAS_TRITON:
    pytest.skip("needs Triton's compiler: the package, and no TRITON_INTERPRET", allow_module_level=True)

import triton
import triton.language as tl

from hf_gdn.kernels.triton.tokens import TOKEN_CONFIGS
from hf_gdn.testing.call_changes import packed, padded
from hf_gdn.testing.calls import tensors
from hf_gdn.testing.case import FAMILIES
from hf_gdn.testing.compiled import TARGETS, Launch, check, launches, transposed_products
from hf_gdn.testing.slots import in_slots_of_a_pool

# Bytes per thread that may be spilled, by kernel, target, K and V; V is None where it does not matter.
SPILLS: dict[tuple, int] = {
    # MI300 keeps a few scalars (masks, pointers), never tiles, in spare lanes.
    ("kda scores", "gfx942", 128, None): 32,
    # The widest scan at 4 warps is a dozen registers over; with 8 it is none, but 4 were faster on the H200.
    ("gdn scan of many heads", "sm_90", 128, None): 64,
    ("gdn scan of many heads", "sm_100", 128, None): 128,
    ("kda scan of many heads", "sm_100", 128, None): 32,
    # MI300 keeps masks that do not change from head to head in spare lanes, four bytes each.
    ("gdn prepare", "gfx942", 128, None): 384,
    # Norms of rows and columns of three tiles, a few registers over; models come with normalised q and k.
    ("gdn prepare l2norm", "sm_90", 128, None): 16,
    ("gdn prepare l2norm", "sm_100", 128, None): 48,
    ("gdn prepare l2norm", "gfx942", 128, None): 384,
    # More steps over the channels, which ptxas unrolls and overlaps.
    ("gdn prepare", "sm_80", 256, None): 64,
    ("gdn prepare", "sm_90", 256, None): 16,
    # Gradients of the scores: a key and a query tile beside four of [64, 64]; MI300 as above.
    ("gdn backward scores", "gfx942", 128, None): 132,
    ("gdn backward scores", "sm_80", 256, None): 64,
    ("gdn backward scores", "sm_90", 256, None): 368,
    ("gdn backward reverse", "sm_100", 128, None): 32,
    ("kda backward channels", "sm_100", 128, None): 16,
    # Two registers; uncut the A100's scan just fits.
    ("gdn scan of segments", "sm_80", 128, 128): 8,
}
# By name: op, kernel, and whether q and k are normalised inside.
KERNELS = {
    "gdn prepare": ("chunk_gdn", "prepare_kernel", False),
    "gdn prepare l2norm": ("chunk_gdn", "prepare_kernel", True),
    "gdn scan": ("chunk_gdn", "scan_kernel", True),
    "kda prepare": ("chunk_kda", "prepare_kernel", True),
    "kda prepare normalised": ("chunk_kda", "prepare_kernel", False),  # as models call it: their prologue normalises
    "kda scores": ("chunk_kda", "scores_kernel", True),
    "kda inverse": ("chunk_kda", "inverse_kernel", True),
    "kda scan": ("chunk_kda", "scan_kernel", True),
}
BACKWARD = {
    "gdn backward states": ("backward_gdn", "states_kernel", False),
    "gdn backward reverse": ("backward_gdn", "reverse_kernel", False),
    "gdn backward scores": ("backward_gdn", "score_gradients_kernel", False),
    "gdn backward keys": ("backward_gdn", "key_gradients_kernel", False),
    "kda backward prepare": ("backward_kda", "prepare_kernel", False),
    "kda backward states": ("backward_kda", "states_kernel", False),
    "kda backward reverse": ("backward_kda", "reverse_kernel", False),
    "kda backward scores": ("backward_kda", "score_gradients_kernel", False),
    "kda backward channels": ("backward_kda", "channel_gradients_kernel", False),
}
variants = pytest.mark.parametrize("variant", ["gdn", "kda"])
# Without --all those between which the others lie: the most shared memory and wgmma, and the other vendor's.
FIRST_TARGETS = ("sm_90", "gfx942")
targets = pytest.mark.parametrize(
    "target", [pytest.param(t, marks=[] if t in FIRST_TARGETS else pytest.mark.extended) for t in TARGETS]
)
OTHER_DIMS = pytest.mark.parametrize(("K", "V"), [(96, 192), (256, 256)], ids=str)


def launched(op: str, target: str, change=None, segments=None, token_states=False, **sizes) -> list:
    """Launches of an op on bf16 tensors with a cache, A_log in fp32 as in models."""
    sizes = {"HK": 32 if op.endswith("kda") else 16, "HV": 32, "K": 128, "V": 128, "dtype": torch.bfloat16, **sizes}
    call = registry.ops()[op].make_inputs(**sizes, device="meta")
    if "weights" in call:
        call["weights"] = call["weights"]._replace(A_log=call["weights"].A_log.float())
    call = call if change is None else change(call)
    if token_states:
        B, T, _, V = call["v"].shape
        call["token_states"] = torch.empty(B, T, sizes["HV"], sizes["K"], V, device="meta")
    return launches(registry.get(op, "triton").fn, call, target, segments)


def check_chunks(name, target, K=128, V=128, B=1, change=None, **sizes):
    op, kernel, l2norm = (KERNELS | BACKWARD)[name]
    # No model has fewer key heads than value heads in KDA; its forward is held to the tables in that case too.
    k_heads = 32 if op == "backward_kda" else 16
    found = launched(
        op, target, lambda call: {**(change(call) if change else call), "qk_l2norm": l2norm},
        B=B, T=1000, K=K, V=V, **{"HK": k_heads, **sizes},
    )  # fmt: skip
    (launch,) = (launch for launch in found if launch.name == kernel)
    name = f"{name} of many heads" if B > 4 else name
    return check(launch.compile(), SPILLS.get((name, target, K, None), 0))


@targets
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "kda prepare normalised"] + [*BACKWARD])
def test_chunks_of_head_128(name, target):
    check_chunks(name, target)


@pytest.mark.parametrize("name", KERNELS | BACKWARD)
def test_no_transposed_product_goes_into_another_on_hopper(name):
    assert not transposed_products(check_chunks(name, "sm_90").ir)


@triton.jit
def _transposed_product(p_x, p_y):
    o = tl.arange(0, 64)
    b_x = tl.load(p_x + o[:, None] * 64 + o[None, :])
    b_p = tl.dot(b_x, b_x).to(tl.bfloat16)
    b_y = tl.dot(tl.trans(b_p), b_x)
    tl.store(p_y + o[:, None] * 64 + o[None, :], b_y.to(tl.bfloat16))


def test_such_a_product_is_found():
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    found = Launch(_transposed_product, "sm_90", {"p_x": x, "p_y": x}, {"num_warps": 4}).compile()
    assert len(transposed_products(found.ir)) == 1


@targets
def test_chunks_of_one_value_head_per_key_head(target):
    assert check_chunks("gdn prepare", target, HV=16).spills == 0


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("name", ["gdn scan", "kda scan"])
def test_scan_of_many_heads(name, target):
    check_chunks(name, target, B=8)


# Each kernel once at every other size, the targets in turn; on the tightest ones where it is the tile that grows.
@pytest.mark.parametrize(
    ("name", "target", "K", "V"),
    [
        ("gdn prepare", "sm_80", 256, 256),
        ("gdn prepare", "sm_90", 256, 256),
        ("gdn prepare", "sm_100", 96, 192),
        ("gdn prepare l2norm", "sm_80", 16, 16),
        *(("kda prepare", target, 256, 256) for target in TARGETS),
        ("kda prepare", "sm_100", 96, 192),
        ("kda scores", "sm_90", 256, 256),
        ("kda inverse", "sm_80", 256, 256),
        *(("kda scan", target, 256, 256) for target in TARGETS),
        ("gdn scan", "sm_80", 256, 256),
        ("gdn scan", "gfx942", 256, 256),
        ("gdn scan", "sm_80", 96, 192),
        ("kda scan", "sm_90", 96, 192),
        ("gdn backward scores", "sm_80", 256, 256),
        ("gdn backward scores", "sm_90", 256, 256),
        ("gdn backward keys", "sm_80", 256, 256),
        ("gdn backward reverse", "sm_80", 256, 256),
        ("kda backward states", "gfx942", 256, 256),
        ("kda backward reverse", "sm_80", 256, 256),
        ("kda backward scores", "sm_90", 96, 192),
        ("kda backward channels", "sm_90", 256, 256),
    ],
)
@pytest.mark.extended
def test_chunks_of_other_heads(name, target, K, V):
    check_chunks(name, target, K, V)


@targets
@pytest.mark.parametrize("K", [128, 256])
def test_kda_preparation_of_what_is_normalised_already(target, K):
    check_chunks("kda prepare normalised", target, K)


@pytest.mark.parametrize("name", ["gdn prepare", "kda prepare", "kda scores", "kda inverse", "kda scan"])
def test_packed_chunks(name):
    check_chunks(name, "sm_90", change=packed(0, 300, 500, 1000))


# ----------------------------------------------------------------------------------------- long sequences in segments


def check_segments(name, op, target, K=128, V=128, change=None, dtype=torch.bfloat16):
    """One of the passes over 16 segments: the states' scan, their merge, or the scan of all segments."""
    passes = launched(op, target, change, segments=16, T=9000, HK=1, HV=2, K=K, V=V, dtype=dtype)[-3:]
    launch = passes[["states", "merge", "scan"].index(name)]
    check(launch.compile(), SPILLS.get((f"{op[-3:]} {name} of segments", target, K, V), 0))


@targets
@pytest.mark.parametrize("name", ["states", "scan"])
@variants
def test_passes_over_segments(variant, name, target):
    check_segments(name, f"chunk_{variant}", target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["native", "fp32"])
@targets
def test_merge_of_segments(target, dtype):
    check_segments("merge", "chunk_gdn", target, dtype=dtype)


@pytest.mark.parametrize(("K", "V"), [(64, 64), (96, 192), (256, 256)])
@targets
@pytest.mark.extended
def test_merge_of_other_heads(target, K, V):
    check_segments("merge", "chunk_gdn", target, K, V)


@pytest.mark.parametrize(
    ("op", "target", "K", "V"),
    [
        ("chunk_gdn", "sm_80", 256, 256),
        ("chunk_kda", "sm_100", 256, 256),
        ("chunk_gdn", "sm_90", 96, 192),
        ("chunk_kda", "gfx942", 96, 192),
    ],
)
@pytest.mark.extended
def test_states_of_other_heads(op, target, K, V):
    check_segments("states", op, target, K, V)


def test_packed_segments():
    change = packed(0, 4500, 9000)
    for name, op in (("states", "chunk_gdn"), ("scan", "chunk_kda"), ("merge", "chunk_gdn")):
        check_segments(name, op, "sm_90", change=change)


# --------------------------------------------------------------------------------- recurrent rule, step, prologue, norm


def check_all(*args, **kwargs):
    found = launched(*args, **kwargs)
    assert found
    for launch in found:
        check(launch.compile())


# By row of the launch table a batch of so many heads, 32 a sequence; the last row's tile takes most registers.
BATCHES = [config.max_heads // 32 for config in TOKEN_CONFIGS[:-1]] + [TOKEN_CONFIGS[-2].max_heads // 32 + 1]
MANY = BATCHES[-1]


def to_normalise(call):
    return {**call, "qk_l2norm": True}


def recurrent(variant, target, change=to_normalise, **sizes):
    check_all(f"recurrent_{variant}", target, change, **{"B": MANY, "T": 5, "HK": 16, **sizes})


@targets
@pytest.mark.parametrize("batch", BATCHES)
@variants
def test_recurrent_rule_with_every_row_of_the_table(target, batch, variant):
    recurrent(variant, target, B=batch)


@targets
def test_recurrent_rule_for_one_token(target):  # KDA has more to remember than GDN
    recurrent("kda", target, T=1)


@targets
def test_recurrent_rule_packed_with_token_states(target):
    cut = packed(*range(MANY + 1))
    recurrent("kda", target, lambda call: to_normalise(cut(call)), B=1, T=MANY, token_states=True)


@targets
@OTHER_DIMS
@variants
@pytest.mark.extended
def test_recurrent_rule_of_other_dims(target, K, V, variant):
    recurrent(variant, target, K=K, V=V)


def step(variant, target, B=MANY, T=1, **sizes):
    spec = FAMILIES["kimi_linear" if variant == "kda" else "qwen3_next"][1]
    check_all(f"step_{variant}", target, B=B, T=T, **spec, **sizes)


@targets
@pytest.mark.parametrize("batch", BATCHES)
@variants
def test_step_with_every_row_of_the_table_for_one_token(target, batch, variant):
    step(variant, target, batch)


@targets
@variants
def test_step_of_several_tokens(target, variant):
    step(variant, target, T=5, bias=True)


@targets
@OTHER_DIMS
@pytest.mark.extended
def test_step_of_other_dims(target, K, V):
    step("kda", target, K=K, V=V)


@targets
def test_step_with_a_wide_convolution(target):
    step("gdn", target, width=8)


@targets
@variants
def test_prologue(target, variant):
    check_all(f"prologue_{variant}", target, T=1000)


@pytest.mark.parametrize(
    ("target", "variant", "K", "V"),
    [("sm_80", "kda", 256, 256), ("sm_90", "gdn", 96, 192), ("gfx942", "kda", 256, 256), ("sm_100", "kda", 64, 64)],
)
@pytest.mark.extended
def test_prologue_of_other_heads(target, variant, K, V):
    check_all(f"prologue_{variant}", target, T=1000, K=K, V=V, bias=True)


@variants
def test_prologue_of_packed_and_padded_rows(variant):
    check_all(f"prologue_{variant}", "sm_90", packed(0, 300, 1000), T=1000)
    check_all(f"prologue_{variant}", "sm_90", padded(1000, 300), B=2, T=1000, width=8)


# ------------------------------------------------------------------------------------------------------ states in slots


@pytest.mark.parametrize("target", FIRST_TARGETS)
@pytest.mark.parametrize(
    "op", ["step_gdn", "step_kda", "recurrent_gdn", "recurrent_kda", "prologue_gdn", "prologue_kda"]
)
def test_states_in_slots(op, target):
    change = None if op.startswith("step") else packed(0, 300, 301, 1000)
    sizes = dict(B=MANY, T=1) if op.startswith("step") else dict(T=1000)
    check_all(op, target, lambda call: in_slots_of_a_pool(op, change(call) if change else call), **sizes)


@pytest.mark.parametrize("target", FIRST_TARGETS)
@pytest.mark.parametrize("name", ["gdn scan", "kda scan"])
def test_scan_with_states_in_slots(name, target):
    cut = packed(0, 300, 301, 1000)
    check_chunks(name, target, change=lambda call: in_slots_of_a_pool(KERNELS[name][0], cut(call)))


@targets
@pytest.mark.parametrize("V", [128, 256])
def test_gated_norm(target, V):
    check_all("gated_norm", target, B=3, T=5, HK=16, V=V)


@targets
@variants
def test_backward_prologue(target, variant):
    check_all(f"backward_prologue_{variant}", target, T=1000)


@pytest.mark.parametrize(
    ("target", "variant", "K", "V"),
    [
        ("sm_80", "kda", 256, 256),
        ("sm_90", "gdn", 96, 192),
        ("gfx942", "kda", 256, 256),
        ("sm_100", "kda", 64, 64),
        ("sm_100", "gdn", 32, 32),
        ("sm_90", "kda", 16, 16),
    ],
)
@pytest.mark.extended
def test_backward_prologue_of_other_heads(target, variant, K, V):
    check_all(f"backward_prologue_{variant}", target, T=1000, K=K, V=V, bias=True)


def test_backward_prologue_of_packed_and_padded_rows():
    check_all("backward_prologue_gdn", "sm_90", packed(0, 300, 1000), T=1000)
    check_all("backward_prologue_kda", "sm_90", padded(1000, 300), B=2, T=1000, width=8, lower_bound=-5.0)


@targets
@pytest.mark.parametrize("V", [128, 256])
def test_backward_gated_norm(target, V):
    check_all("backward_gated_norm", target, B=3, T=5, HK=16, V=V)


# -------------------------------------------------------------------------------------------------------------- memory

BYTES_PER_TOKEN_AND_HEAD = 6 * 1024


class _Allocations(TorchDispatchMode):
    """Bytes of every storage that comes to be, whether or not it lives on: more than the most held at one time."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.storages = {x.untyped_storage()._cdata: 0 for x in known}
        self.alive: list[torch.Tensor] = []  # so that no storage takes the place of another

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.alive.append(x)
                self.storages.setdefault(x.untyped_storage()._cdata, x.untyped_storage().nbytes())
        return result

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "packed"])
@variants
def test_memory_of_chunks_per_token_and_head_beside_the_results(variant, cut):
    T, heads, K, V = 512, 4, 128, 128
    op = registry.ops()[f"chunk_{variant}"]
    call = op.make_inputs(T=T, HK=2, HV=heads, K=K, V=V, dtype=torch.bfloat16)
    call = packed(0, 100, T, state=False)(call) if cut else call
    with _Allocations(*tensors(call)) as allocations:
        launches(registry.get(op.name, "triton").fn, call, "sm_90")
    extra = allocations.bytes - T * heads * V * 2 - (1 + cut) * heads * K * V * 4
    assert 0 < extra <= BYTES_PER_TOKEN_AND_HEAD * T * heads, f"{extra / T / heads:.0f} bytes per token and head"
