"""Programs for a process that has Hugging Face's kernels package (test_hub_kernels.py).

``python -m tests.ecosystem.with_hub_kernels NAME,NAME FAMILY FAMILY`` prints "same" at the end.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from kernels import Mode, kernelize, register_kernel_mapping, use_kernel_mapping
from transformers import AutoModelForCausalLM, KernelConfig
from transformers.integrations import hub_kernels as theirs

import hf_gdn
from hf_gdn import hub_kernels, ops, patches, registry
from hf_gdn.loading.models import ASSETS
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import GRADIENT, LAYER
from hf_gdn.upstream import original_kernels
from hf_gdn.upstream.hub_kernels import wrapped, writes_twice
from tests import tiny_models as tiny
from tests.ecosystem.common import logits, runs_ours

torch.set_num_threads(1)
IDS, MASK = tiny.batch()
CALLS: Counter = Counter()
FUNCTIONS = {"chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", "chunk_kda", "fused_recurrent_kda"}


def count() -> None:
    """Count the calls of our functions in `CALLS`."""

    def counted(name, function):
        return lambda *given, **named: CALLS.update([name]) or function(*given, **named)

    for name in FUNCTIONS:
        setattr(ops, name, counted(name, getattr(ops, name)))
    hub_kernels.call_norm = counted("norm", hub_kernels.call_norm)


def generate(model) -> torch.Tensor:
    return model.generate(IDS[:1], max_new_tokens=16, do_sample=False, eos_token_id=None)


def calls_of(run, *given) -> tuple[Counter, torch.Tensor]:
    """The calls of our functions in ``run(*given)``, and what it returns."""
    CALLS.clear()
    result = run(*given)
    return Counter(CALLS), result


def expected(model, steps: int) -> Counter:
    """Calls of one prefill and some decoding steps: each layer calls one delta rule and one norm a forward."""
    layers, kda = len(tiny.mixers(model)), hasattr(tiny.mixer(model), "forget_gate")
    rule = "kda" if kda else "gated_delta_rule"
    return Counter({f"chunk_{rule}": layers, f"fused_recurrent_{rule}": steps * layers, "norm": (1 + steps) * layers})


def patched(families) -> None:
    """hf_gdn.patch() reaches models with use_kernels=True, and leaves them."""
    for family in families:
        wanted = logits(tiny.model(family), IDS)
        for when in ("before", "after"):
            if when == "before":
                hf_gdn.patch(strict=True)
            model = tiny.model(family)
            model.use_kernels = True
            assert model._use_kernels
            hf_gdn.patch(strict=True)
            assert runs_ours(model, IDS), f"{family}, {when}: the patch does not reach the model"
            assert_close("logits", logits(model, IDS), wanted, LAYER)
            hf_gdn.unpatch()
            assert not runs_ours(model, IDS), f"{family}, {when}: the patch does not leave the model"
            assert torch.equal(logits(model, IDS), wanted)


def loaded(families) -> None:
    """from_pretrained(use_kernels=True) as docs/ecosystem.md has it, on the embedded models, and back again."""
    page = (Path(hf_gdn.__file__).parents[1] / "docs" / "ecosystem.md").read_text("utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```$", page, re.S | re.M)
    for family in families:
        folder = ASSETS / f"{family}-tiny"
        original = AutoModelForCausalLM.from_pretrained(folder).float()
        forward, wanted, tokens = type(tiny.mixer(original)).forward, logits(original, IDS), generate(original)
        assert set(original_kernels.kernels_of(forward).values()) == {"torch"}
        names = dict(hf_gdn=hf_gdn, AutoModelForCausalLM=AutoModelForCausalLM, folder=folder)
        exec(code, names)
        model = names["model"].float()
        assert_close("logits", logits(model, IDS), wanted, LAYER)
        calls, found = calls_of(generate, model)
        assert calls == expected(model, 15) and torch.equal(found, tokens)
        assert type(tiny.mixer(model)).forward is forward and not hf_gdn.status().active
        assert set(original_kernels.kernels_of(forward).values()) == {"torch", "hf_gdn"}  # the convolutions are torch's
        assert original_kernels.delta_rule_of(forward) == "torch"
        # A KernelConfig inherits what is registered, unless it is told not to.
        model.set_use_kernels(True, KernelConfig())
        assert calls_of(logits, model, IDS)[0] == expected(model, 0)
        model.set_use_kernels(True, KernelConfig(inherit_mapping=False))
        assert calls_of(logits, model, IDS)[0] == Counter()
        assert torch.equal(logits(model, IDS), wanted)


def tiny_models(families) -> None:
    """Random models with padding, their gradients, and a mapping for a named backend in a block of its own."""
    for family in families:
        original, model = tiny.model(family), tiny.model(family)
        wanted, tokens = logits(original, IDS, attention_mask=MASK), generate(original)
        loss = original(IDS, labels=IDS).loss
        loss.backward()
        with use_kernel_mapping(hf_gdn.kernel_mapping(backend="eager")):
            model.set_use_kernels(True)
        assert "backend eager" in str(hf_gdn.kernel_mapping("eager")["chunk_kda"]["cpu"])
        assert_close("logits", logits(model, IDS, attention_mask=MASK)[MASK > 0], wanted[MASK > 0], LAYER)
        calls, found = calls_of(generate, model)
        assert calls == expected(model, 15) and torch.equal(found, tokens)
        with pytest.raises(ValueError, match=r"got packed sequences.*hf_gdn\.patch\(\) serves them"):
            model(IDS[:1], cu_seq_lens_q=torch.tensor([0, 20, 70]))
        layer = tiny.mixer(model)
        functions = [f for f in layer._kernel_funcs.values() if "delta" in wrapped(f).__name__]
        beta_max = 1 + all(writes_twice(f) for f in functions)
        assert len(functions) == 2 and beta_max == patches.all_families()[family].spec(layer).beta_scale
        found = model(IDS, labels=IDS).loss
        found.backward()
        assert_close("loss", found, loss, LAYER)
        mine, others = (
            {name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (model, original)
        )
        assert set(mine) == set(others)
        whole = torch.cat([x.flatten() for x in others.values()]).norm()
        for name, gradient in others.items():
            off = (mine[name] - gradient).norm()
            assert off <= GRADIENT * gradient.norm() + 1e-7 * whole, f"gradient of {name}: off by {off:.1e}"


def gpu(families) -> None:
    """On CUDA devices, whatever their capability, ours come before transformers' own entries, registered after ours."""
    ours = hf_gdn.kernel_mapping()
    hub = {name: theirs.get_kernel_mapping_transformers()[name] for name in ours}
    for family in families:
        for capability in ((7, 5), (9, 0), (12, 1)):
            torch.cuda.get_device_capability = lambda device=None, found=capability: found
            model = tiny.model(family)
            with use_kernel_mapping(hub, inherit_mapping=False):
                register_kernel_mapping(ours)
                register_kernel_mapping(hub)
                kernelize(model, device="cuda", mode=Mode.INFERENCE, use_fallback=True)
            assert calls_of(logits, model, IDS)[0] == expected(model, 0)


def compiled(families) -> None:
    """torch.compile(fullgraph=True) goes through ours."""
    register_kernel_mapping(hf_gdn.kernel_mapping())
    for family in families:
        model = tiny.model(family)
        wanted = logits(model, IDS)
        model.set_use_kernels(True)
        step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert_close("logits", step(IDS, use_cache=False).logits, wanted, LAYER)
        assert f"chunk_{patches.all_families()[family].variant}" in dict(registry.chosen())


if __name__ == "__main__":
    programs, families = sys.argv[1].split(","), sys.argv[2:]
    if programs != ["compiled"]:  # which cannot go through a counter
        count()
    for program in programs:
        {f.__name__: f for f in (patched, loaded, tiny_models, gpu, compiled)}[program](families)
    print("same")
