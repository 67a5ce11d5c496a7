"""Faults in patched layers and in patching itself: whatever raises half-way leaves things as they were, or done.

A forward that raises must not have moved a layer's convolution window and not its recurrent state, or the reverse: who
catches the error and calls again would get wrong numbers without a word. An interrupted patch() leaves transformers as
it was, whichever line the interruption came at.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import linecache
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache as remember
from itertools import pairwise
from types import FrameType, SimpleNamespace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import hf_gdn
from hf_gdn import patches, registry
from hf_gdn.cuda_graphs import captured_step, decode_session
from hf_gdn.kernels import contract
from hf_gdn.kernels.eager import step as eager_step
from hf_gdn.patches import api, family_patch, forward, in_force, inspect, swap, text_model
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER
from tests import tiny_models as tiny

ERRORS = [RuntimeError, KeyboardInterrupt]
errors = pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
# One family a rule: what raises half-way in the forward is common to all.
RULES = pytest.mark.parametrize("rule", ["qwen3_next", "kimi_linear"])


def examples(number: int) -> settings:
    """The same examples in every run, on any machine, none stored."""
    return settings(
        max_examples=number, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


model_of = remember(tiny.model)


def hidden(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Hidden states ``[rows, length, 32]``."""
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))


def run(layer, x, cache=None, **kwargs):
    with torch.no_grad():
        return layer(x, **tiny.layer_given(layer, cache), **kwargs)


def filled(name: str, rows: int = 2, length: int = 6, index: int = 0) -> DynamicCache:
    """A cache that a patched layer has put `length` tokens into, none for 0."""
    model = model_of(name)
    cache = DynamicCache(config=model.config)
    if length:
        run(tiny.mixer(model, index), hidden(rows, length, seed=1), cache)
    return cache


def held(cache, index: int = 0) -> tuple[torch.Tensor, ...] | None:
    """Copies of a layer's convolution window and recurrent state; None when it says that it holds none."""
    states = cache.layers[index]
    if not states.has_previous_state[0]:
        return None
    assert states.recurrent_states[0] is not None, "a window without a recurrent state"
    return states.conv_states[0].clone(), states.recurrent_states[0].clone()


def same(one, other) -> bool:
    """Equal to the bit."""
    if one is None or other is None:
        return one is other
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(one, other))


# ------------------------------------------------------------------------------------------------------- valid calls


@st.composite
def readings(draw):
    """Rows, left padding of each, and the pieces in which the tokens are read.

    No padded token is read by itself before more padding: transformers drops the mask of single tokens, and its layers
    are exact only if the states are still zero when padding ends (docs/differences.md).
    """
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 40) | st.sampled_from([64, 65]))
    padding = [draw(st.integers(0, length - 1)) for _ in range(rows)]
    cuts = sorted(draw(st.lists(st.integers(1, length), max_size=4)))
    bounds = sorted({0, *cuts, length})
    assume(not any(b - a == 1 and b < max(padding) for a, b in pairwise(bounds)))
    return rows, length, padding, [b - a for a, b in pairwise(bounds) if b > a], draw(st.integers(0, 1000))


@examples(8)
@given(reading=readings())
def test_any_reading_equals_the_original(family, reading):
    rows, length, padding, pieces, seed = reading
    model = model_of(family)
    ids, _ = tiny.batch(rows, length, seed)
    mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()

    def read():
        cache, logits, start = DynamicCache(config=model.config), [], 0
        for size in pieces:
            here = slice(start, start + size)
            start += size
            with torch.no_grad():
                out = model(ids[:, here], **tiny.given(cache), attention_mask=mask[:, :start])
            logits.append(out.logits)
        return torch.cat(logits, 1)[mask.bool()]

    wanted = read()
    with hf_gdn.patched(family, strict=True):
        assert_close("logits", read(), wanted, LAYER)


@examples(15)
@given(data=st.data())
def test_what_is_not_finite_stays_in_its_row(family, data):
    """Of a layer: a model's experts may gather rows in one product."""
    rows = data.draw(st.integers(2, 4))
    row = data.draw(st.integers(0, rows - 1))
    value = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    pieces = data.draw(st.lists(st.sampled_from([1, 2, 5, 65]), min_size=1, max_size=3))
    ill_piece = data.draw(st.integers(0, len(pieces) - 1))
    model, others = model_of(family), torch.arange(rows) != row
    layer, results = tiny.mixer(model), []
    token = data.draw(st.integers(0, pieces[ill_piece] - 1))
    hf_gdn.patch(family)
    for ill in (False, True):
        cache, outputs = DynamicCache(config=model.config), []
        for n, size in enumerate(pieces):
            x = hidden(rows, size, seed=n)
            if ill and n == ill_piece:
                x[row, token] = value
            outputs.append(run(layer, x, cache)[others])
        results.append((*outputs, *(x[others] for x in held(cache))))
        if ill:
            assert not torch.isfinite(held(cache)[1][row]).all()  # it did arrive
    assert same(*results)


# ------------------------------------------------------------------------------------------------ half-way in a forward

# Tokens held and tokens given: a first call, pieces for the chunk and the recurrent kernel, and a decode step.
CALLS = {"first": (0, 9), "first_short": (0, 2), "piece": (6, 9), "short_piece": (6, 3), "step": (6, 1)}
calls = pytest.mark.parametrize("call", CALLS)


class Fault:
    """Raises `error` where it is called."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.hits = error, 0

    def __call__(self, *args, **kwargs):
        self.hits += 1
        raise self.error("injected")


def _in_projections(patch, family, fault):
    patch.setattr(type(family), "project", fault)


def _in_norm(patch, family, fault):
    patch.setattr(eager_step, "gated_norm", fault)
    _in_kernels(patch, fault, "gated_norm")


def _in_prologue(patch, family, fault):
    _in_kernels(patch, fault, "prologue", "step")


def _in_delta_rule(patch, family, fault):
    _in_kernels(patch, fault, "chunk", "recurrent", "step")


def _in_kernels(patch, fault, *ops):
    for kernel in registry.kernels():
        if kernel.op.startswith(ops):
            patch.setitem(registry._table, (kernel.op, kernel.backend), dataclasses.replace(kernel, fn=fault))
    patch.setattr(registry, "generation", -1)  # plans are made anew


def _in_convolution(patch, family, fault):
    # What the activation is: a product, an addition or a window may have been written by then.
    patch.setattr(eager_step.F, "silu", fault)
    patch.setitem(contract.ACTIVATIONS, "silu", fault)


STEPS = {
    "projections": _in_projections,
    "prologue": _in_prologue,
    "convolution": _in_convolution,
    "delta_rule": _in_delta_rule,
    "norm": _in_norm,
}


@RULES
@calls
@errors
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_raises_moves_both_states_or_none(rule, call, error, step, monkeypatch, without_numba):
    length, tokens = CALLS[call]
    layer, x = tiny.mixer(model_of(rule)), hidden(2, tokens)
    with hf_gdn.patched(rule):
        cache = filled(rule, length=length)
        done = copy.deepcopy(cache)
        wanted = run(layer, x, done)
        before, fault = held(cache), Fault(error)
        with monkeypatch.context() as patch, pytest.raises(error, match="injected"):
            STEPS[step](patch, patches.all_families()[rule], fault)
            run(layer, x, cache)
        assert fault.hits == 1
        if not same(held(cache), held(done)):
            assert same(held(cache), before), "one state moved"
            assert torch.equal(run(layer, x, cache), wanted)  # the call repeated is as if nothing had been
            assert same(held(cache), held(done))


@RULES
@errors
def test_a_later_layer_that_raises_leaves_each_layer_whole(rule, error, monkeypatch):
    model, family = model_of(rule), patches.all_families()[rule]
    ids, _ = tiny.batch(2, 20)
    with hf_gdn.patched(rule), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :12], **tiny.given(cache))
        done = copy.deepcopy(cache)
        model(ids[:, 12:], **tiny.given(done))
        before, project = [held(cache, n) for n in range(3)], type(family).project

        def second_fails(self, layer, x):
            if layer is tiny.mixer(model, 1):
                raise error("injected")
            return project(self, layer, x)

        monkeypatch.setattr(type(family), "project", second_fails)
        with pytest.raises(error, match="injected"):
            model(ids[:, 12:], **tiny.given(cache))
    assert same(held(cache, 0), held(done, 0))
    assert same(held(cache, 1), before[1]) and same(held(cache, 2), before[2])


class FullMemory(TorchDispatchMode):
    """Raises MemoryError at the n-th operator that makes a tensor; n = None counts them."""

    def __init__(self, n: int | None = None) -> None:
        super().__init__()
        self.n, self.count = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if all(result.alias_info is None for result in func._schema.returns):  # neither in place nor a view
            if self.count == self.n:
                raise MemoryError(str(func))
            self.count += 1
        return func(*args, **(kwargs or {}))


@RULES
@pytest.mark.parametrize("call", CALLS)
def test_memory_that_runs_out_anywhere_moves_both_states_or_none(rule, call):
    length, tokens = CALLS[call]
    layer, x = tiny.mixer(model_of(rule)), hidden(2, tokens)
    with hf_gdn.patched(rule):
        full = filled(rule, length=length)
        before, done = held(full), copy.deepcopy(full)
        with FullMemory() as memory:
            run(layer, x, done)
        assert memory.count > 5  # compiled kernels are few operators
        torn = []
        for n in range(memory.count):
            cache = copy.deepcopy(full)
            with pytest.raises(MemoryError) as failure, FullMemory(n):
                run(layer, x, cache)
            try:
                whole = same(held(cache), before) or same(held(cache), held(done))
            except AssertionError:
                whole = False
            if not whole:
                torn.append(f"{n}: {failure.value}")
    assert not torn, f"of {memory.count} operators: {', '.join(torn)}"


# ----------------------------------------------------------------------------------------------- caches that do not fit


@examples(10)
@given(rows=st.integers(1, 4), others=st.integers(1, 4), tokens=st.sampled_from([1, 2, 3, 5]))
def test_a_cache_of_another_batch_is_refused(family, rows, others, tokens):
    hf_gdn.patch(family)
    cache = filled(family, rows)
    before, layer = held(cache), tiny.mixer(model_of(family))
    if rows == others:
        run(layer, hidden(others, tokens), cache)
        return
    with pytest.raises(ValueError, match=rf"{family} layer 0: the cache's .* got \[{rows}, "):
        run(layer, hidden(others, tokens), cache)
    assert same(held(cache), before)


@RULES
@pytest.mark.parametrize("tokens", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_cache_of_another_dtype_is_refused(rule, tokens, dtype):
    with hf_gdn.patched(rule):
        cache = filled(rule)
        before, layer = held(cache), copy.deepcopy(tiny.mixer(model_of(rule))).to(dtype)
        with pytest.raises(ValueError, match=rf"{rule} layer 0: the cache's .*float"):
            run(layer, hidden(2, tokens).to(dtype), cache)
    assert same(held(cache), before)


# ----------------------------------------------------------------------------------------------- half-way in patch()

FAMILIES = {name: patches.all_families()[name] for name in ("kimi_linear", "qwen3_next")}  # two have all the steps


def layer_class(name: str) -> type:
    return getattr(importlib.import_module(FAMILIES[name].module), FAMILIES[name].class_name)


@contextmanager
def interrupted(at: Callable[[FrameType], BaseException | None]):
    """Ask `at` before every line of hf_gdn.patches, and raise what it gives."""
    modules = (api, family_patch, forward, in_force, inspect, swap, text_model, captured_step, decode_session)
    files = {module.__file__ for module in modules}

    def local(frame, event, argument):
        error = at(frame) if event == "line" else None
        if error is not None:
            raise error
        return local

    earlier = sys.gettrace()
    sys.settrace(lambda frame, event, argument: local if frame.f_code.co_filename in files else None)
    try:
        yield
    finally:
        sys.settrace(earlier)


def place(frame: FrameType) -> tuple[str, str, int]:
    return frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno


def places(action: Callable[[], object]) -> list[tuple[tuple[str, str, int], int]]:
    """Lines of hf_gdn.patches that an action runs, each with its first and its last turn.

    Without those where Python runs nothing that an interruption could meet (``try:``, leaving a with block), and
    without the context managers' own: nobody can guard the way from the end of a block to what undoes it.
    """
    turns: dict[tuple[str, str, int], int] = {}

    def note(frame):
        turns[place(frame)] = turns.get(place(frame), 0) + 1

    with interrupted(note):
        action()
    found = []
    for (file, function, line), count in turns.items():
        text = linecache.getline(file, line).strip()
        if function not in ("patched", "restored") and text not in ("try:", "finally:"):
            found += [
                ((file, function, line), turn)
                for turn in sorted({1, count})
                if turn == 1 or not text.startswith("with ")
            ]
    return found


def raising(where: tuple[str, str, int], turn: int, error: type[BaseException]):
    left = turn

    def at(frame):
        nonlocal left
        if place(frame) == where:
            left -= 1
            if left == 0:
                return error("injected")
        return None

    return at


@pytest.fixture
def hooked(monkeypatch):
    """A layer that accelerate has hooked: it holds on to the forward it had. It is found without the slow search."""
    layer = copy.deepcopy(tiny.mixer(model_of(next(iter(FAMILIES)))))
    add_hook_to_module(layer, ModelHook())
    monkeypatch.setattr(swap, "gc", SimpleNamespace(get_referrers=lambda *classes: [layer]))
    yield layer
    remove_hook_from_module(layer)


@remember
def changed_places() -> list[tuple[type | dict, str]]:
    """Classes and names of all attributes that patching changes, and dicts and keys of items."""
    with hf_gdn.patched(FAMILIES, cuda_graphs=True):
        return [(change.cls, change.name) for change in in_force.current().swaps()]


def attributes() -> list[object]:
    """All attributes and items that patching changes, in the order of `changed_places`."""
    return [swap.class_attribute(*place) for place in changed_places()]


def changed_names() -> list[tuple[object, str]]:
    """`changed_places` by what can be a key of a dict."""
    return [(id(owner) if isinstance(owner, dict) else owner, name) for owner, name in changed_places()]


def put_back(originals) -> None:
    for (owner, name), value in zip(changed_places(), originals, strict=True):
        if isinstance(owner, dict):
            owner.pop(name, None)
            owner.update({} if value is swap.MISSING else {name: value})
        elif value is not swap.MISSING:
            setattr(owner, name, value)
        elif name in owner.__dict__:
            delattr(owner, name)
    in_force._table = in_force.Table()


@pytest.fixture
def originals():
    """Original attributes, put back with brute force whatever a test has left."""
    found = attributes()
    yield found
    put_back(found)


def standing(hooked) -> tuple:
    """All that patching changes: attributes of classes, what a hooked layer holds, the table, the status."""
    return attributes(), hooked._old_forward.__func__, in_force.current(), hf_gdn.status()


def free(lock) -> bool:
    """Whether another thread can take the lock."""
    taken = []

    def take():
        if lock.acquire(blocking=False):
            lock.release()
            taken.append(True)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return bool(taken)


def _nothing():
    pass


def _one_of_them():
    hf_gdn.patch(next(iter(FAMILIES)), backend="eager")


def _all_of_them():
    hf_gdn.patch(FAMILIES)


def _in_a_block():
    with hf_gdn.patched(FAMILIES):
        pass


def _graphs_of_one():
    hf_gdn.patch(FAMILIES)
    hf_gdn.patch(next(iter(FAMILIES)), cuda_graphs=True)


STANDS = {"nothing": _nothing, "one": _one_of_them, "all": _all_of_them, "graphs": _graphs_of_one}


def _patch_otherwise():
    hf_gdn.patch(FAMILIES, backend="eager", cuda_graphs=True)


ACTIONS = {"patch": _patch_otherwise, "block": _in_a_block, "unpatch": hf_gdn.unpatch}


@errors
@pytest.mark.parametrize("stand", STANDS)
@pytest.mark.parametrize("does", ACTIONS)
def test_an_interruption_at_any_line_leaves_all_as_it_was(does, stand, error, hooked, originals, monkeypatch):
    """Or for unpatch() as it wants to have it."""
    action = ACTIONS[does]

    def reset():
        put_back(originals)
        hooked._old_forward = dict(zip(changed_names(), originals))[type(hooked), "forward"].__get__(hooked)
        monkeypatch.setattr(in_force, "lock", threading.RLock())
        STANDS[stand]()
        return standing(hooked)

    reset()
    steps = places(action)
    done = standing(hooked)
    assert len(steps) > 20
    left = []
    for where, turn in steps:
        before = reset()
        with pytest.raises(error, match="injected"), interrupted(raising(where, turn, error)):
            action()
        now, here = standing(hooked), f"{where[1]}, line {where[2]}, turn {turn}"
        assert free(in_force.lock), f"{here}: the lock is still held"
        if now != before and not (does == "unpatch" and now == done):
            what = ("classes", "hooked layer", "table", "status")
            left.append(f"{here}: {', '.join(w for w, x, y in zip(what, now, before) if x != y)}")
            continue
        assert hf_gdn.patch(FAMILIES, cuda_graphs=True).active
        assert all(now is not original for now, original in zip(attributes(), originals, strict=True))
        hf_gdn.unpatch()
        assert standing(hooked)[0] == originals
    assert not left, "not as before: " + "; ".join(left)
