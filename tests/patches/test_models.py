"""Patched models are the original models: tiny random weights, fp32, within LAYER, identical tokens."""

import copy
import logging
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, StaticCache

import hf_gdn
from hf_gdn import log
from hf_gdn.errors import BackendError
from hf_gdn.testing import assert_close, error
from hf_gdn.testing.tolerances import GRADIENT, LAYER, SAME_SUMS
from hf_gdn.upstream.modules import checkpointing_enable
from tests import tiny_models as tiny
from tests.patches.layer_runs import multiply_from_the_left, stride_parameters


@pytest.fixture
def model(family):
    return tiny.model(family)


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def decode(model, ids, pieces, cache=None, mask=None):
    """Logits of a sequence read in pieces through a cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    out, start = [], 0
    for size in pieces:
        part = slice(start, start + size)
        attention = None if mask is None else mask[:, : part.stop]
        out.append(logits(model, ids[:, part], **tiny.given(cache), attention_mask=attention))
        start += size
    return torch.cat(out, 1)


def compare(run, budget=LAYER):
    """Run original and patched; returns the patched result."""
    wanted = run()
    with hf_gdn.patched(strict=True):
        got = run()
    assert_close("logits", got, wanted, budget)
    return got


@pytest.mark.parametrize("length", [1, 2, 5, 63, 64, 65, 130])
def test_full_forward(model, length):
    ids, _ = tiny.batch(length=length)
    compare(lambda: logits(model, ids))


@tiny.mainly("qwen3_next", "kimi_linear")
@pytest.mark.parametrize("width", [1, 3, 4, 8])  # kernels have a case for every width
def test_convolution_widths(family, width):
    model = tiny.model(family, linear_conv_kernel_dim=width)
    ids, _ = tiny.batch()
    full = compare(lambda: logits(model, ids))
    pieces = [40, 1, 1, 3, 1, 24]
    compare(lambda: decode(model, ids, pieces))
    with hf_gdn.patched():
        assert_close("decode", decode(model, ids, pieces), full, LAYER)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "tanh"])
def test_activations(family, activation):
    model = tiny.model(family, hidden_act=activation)
    ids, _ = tiny.batch()
    compare(lambda: decode(model, ids, [68, 1, 1]))


def test_left_padding_and_unequal_lengths(model):
    ids, mask = tiny.batch()
    compare(lambda: logits(model, ids, attention_mask=mask)[mask.bool()])
    pieces = [60, 8, 1, 1]  # transformers drops the mask of a single token: those are not padding
    compare(lambda: decode(model, ids, pieces, mask=mask)[mask.bool()])
    # A padded row equals the row alone.
    with hf_gdn.patched():
        row = mask[1].bool()
        alone = logits(model, ids[1:2, row])
        padded = logits(model, ids, attention_mask=mask)[1:2, row]
    assert_close("padded row", padded, alone, LAYER)


@pytest.mark.parametrize("first", [1, 2, 3, 64, 69])
def test_prefill_then_decode_is_the_full_forward(model, first):
    ids, _ = tiny.batch()
    pieces = [first] + [1] * min(5, 70 - first)
    pieces += [70 - sum(pieces)] if sum(pieces) < 70 else []
    got = compare(lambda: decode(model, ids, pieces))
    assert_close("full", got, logits(model, ids), LAYER)


def test_static_cache(model):
    ids, _ = tiny.batch()

    def run():
        return decode(model, ids, [60, 1, 1, 8], StaticCache(config=model.config, max_cache_len=80))

    compare(run)


def test_cache_keeps_its_tensors_and_unpatching_in_mid_conversation_works(model):
    ids, _ = tiny.batch()
    full = logits(model, ids)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, ids[:, :20], **tiny.given(cache))]
    states = cache.layers[0]
    addresses = states.conv_states[0].data_ptr(), states.recurrent_states[0].data_ptr()
    for start in range(20, 70, 10):
        context = hf_gdn.patched() if start % 20 else hf_gdn.unpatched()
        with context:
            for t in range(start, start + 10):
                parts.append(logits(model, ids[:, t : t + 1], **tiny.given(cache)))
    assert_close("switching", torch.cat(parts, 1), full, LAYER)
    assert addresses == (states.conv_states[0].data_ptr(), states.recurrent_states[0].data_ptr())
    assert states.recurrent_states[0].dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(num_beams=3),
        dict(do_sample=True, top_k=20),
        dict(cache_implementation="static", disable_compile=True),
    ],
    ids=["greedy", "beams", "sampling", "static_cache"],
)
def test_generate(model, options):
    ids, mask = tiny.batch()

    def run():
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, **{"do_sample": False, **options})

    wanted = run()
    with hf_gdn.patched(strict=True):
        assert torch.equal(run(), wanted)


def test_patched_before_and_after_the_model_is_made(family, tmp_path):
    ids, _ = tiny.batch()
    wanted = logits(tiny.model(family), ids)
    model = tiny.model(family)
    model.save_pretrained(tmp_path)
    hf_gdn.patch()
    assert_close("config", logits(tiny.model(family), ids), wanted, LAYER)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert_close("loaded", logits(loaded, ids), wanted, LAYER)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(family, dtype):
    """A layer's output is no further from the exact one than twice the original's (routers would amplify that)."""
    model = tiny.model(family)
    layer = tiny.mixer(model).to(dtype)
    x = torch.randn(2, 70, 32).to(dtype)

    def run(layer, x):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [layer(part, **tiny.layer_given(layer, cache)) for part in x.split([60] + [1] * 10, 1)]
            return layer(x), torch.cat(parts, 1)

    with hf_gdn.patched(backend="eager"):
        exact = run(copy.deepcopy(layer).double(), x.double())[0]
    wanted = run(layer, x)
    with hf_gdn.patched(strict=True):
        got = run(layer, x)
    for name, ours, original in zip(("prefill", "decode"), got, wanted):
        assert ours.dtype == dtype
        assert_close(name, ours, exact, 2 * error(original, exact))


@pytest.mark.parametrize("backend", tiny.ON_A_CPU)
@pytest.mark.parametrize("change", [multiply_from_the_left, stride_parameters])
def test_strided_projections_and_parameters(model, change, backend):
    """Prefill, decode steps of two rows, and gradients; against the original's prefill of all tokens."""
    layer, x = tiny.mixer(model), torch.randn(2, 9, 32)
    change(layer)

    def run(*parts):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [layer(part, **tiny.layer_given(layer, cache)) for part in x.split(parts, 1)]
        given = x.clone().requires_grad_()
        gradients = torch.autograd.grad(layer(given).square().sum(), (given, *layer.parameters()))
        return torch.cat(parts, 1), torch.cat([gradient.flatten() for gradient in gradients])

    wanted = run(9)
    with hf_gdn.patched(backend=backend, strict=True):
        got = run(7, 1, 1)
    assert_close("outputs", got[0], wanted[0], LAYER)
    assert_close("gradients", got[1], wanted[1], GRADIENT)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non_reentrant"])
def test_gradients(family, checkpointing):
    ids, mask = tiny.batch()

    def run():
        model = tiny.model(family).train()
        if checkpointing is not None:
            checkpointing_enable(model, {"use_reentrant": checkpointing})
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted = run()
    with hf_gdn.patched(strict=True):
        got = run()
    same_gradients(got, wanted)


def same_gradients(got, wanted):
    assert set(got) == set(wanted)
    # Some gradients (dt_bias) are small remainders of large terms that cancel: what counts there is fp32's relative
    # rounding of the terms, of the order of the whole gradient.
    whole = sum(x.square().sum() for x in wanted.values()).sqrt()
    for name, gradient in wanted.items():
        off = (got[name] - gradient).norm()
        assert off <= GRADIENT * gradient.norm() + 1e-7 * whole, f"gradient of {name}: off by {off:.1e} of {whole:.1e}"


@tiny.mainly("qwen3_next", "kimi_linear")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample(family):
    """By vmap over a gradient; vmap alone maps the kernels of every backend."""
    layer, x = tiny.mixer(tiny.model(family)), torch.randn(3, 40, 32)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))
    wanted = each(weights, x)
    with hf_gdn.patched():
        same_gradients(each(weights, x), wanted)
    for backend in tiny.ON_A_CPU:
        with hf_gdn.patched(backend=backend), torch.no_grad():
            mapped = torch.func.vmap(lambda row: layer(row[None])[0])(x)
            assert_close(backend, mapped, layer(x), LAYER)


def test_forward_mode_is_refused(model):
    layer, x = tiny.mixer(model), torch.randn(1, 5, 32)
    for backend in tiny.ON_A_CPU:
        with hf_gdn.patched(backend=backend), pytest.raises(RuntimeError, match="forward-mode derivatives .* hf_gdn"):
            torch.func.jvp(layer, (x,), (x,))


@tiny.mainly("qwen3_next", "kimi_linear")
def test_backward_hooks_run(family):
    """Of children that hf_gdn reads without calling them, and of all modules."""
    layer, x, calls = tiny.mixer(tiny.model(family)), torch.randn(1, 5, 32, requires_grad=True), []
    read = [child for name, child in layer.named_children() if name in ("norm", "o_norm", "forget_gate")]

    def hook(module, *_):
        calls.extend(child for child in read if child is module)

    registers = [child.register_full_backward_hook for child in read]
    registers += [child.register_full_backward_pre_hook for child in read]
    for register in (*registers, torch.nn.modules.module.register_module_full_backward_hook):
        handle = register(hook)
        layer(x).sum().backward()
        wanted = [calls.pop() for _ in calls[:]]
        with hf_gdn.patched():
            layer(x).sum().backward()
        handle.remove()
        assert wanted and [calls.pop() for _ in calls[:]] == wanted


def test_gradients_without_tokens(model):
    layer = tiny.mixer(model)
    for shape in ((2, 0, 32), (0, 5, 32)):
        x = torch.randn(shape, requires_grad=True)
        with hf_gdn.patched(strict=True):
            layer(x).sum().backward()
        assert x.grad.shape == shape and not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


def test_what_a_layer_keeps_for_its_backward():
    """Outputs of its projections, inputs of its ops, and a state every 256 tokens, each once (docs/training.md)."""
    model, x = tiny.model("qwen3_next"), torch.randn(1, 600, 32, requires_grad=True)
    layer, kept = tiny.mixer(model), []
    HK, HV, K, V = 2, 4, 8, 16
    per_token = 32 + (2 * HK * K + 2 * HV * V) + 2 * HV  # x, the outputs of both projections
    per_token += 2 * HK * K + HV * V + 2 * HV + 2 * HV * V  # q, k, v, g, beta, o and y
    with hf_gdn.patched(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(x)
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    got = sum(size for address, size in storages.items() if address not in parameters)
    assert got <= 4 * (600 * per_token + 600 // 256 * HV * K * V)


def test_lora_on_the_projections(family):
    ids, _ = tiny.batch()
    model = tiny.model(family)
    config = LoraConfig(r=4, target_modules=tiny.projections(model), init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(model, config).eval()
    plain = logits(tiny.model(family), ids)
    got = compare(lambda: logits(model, ids))
    assert error(got, plain) > 1e-3  # the adapters do something

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    wanted = gradients()
    with hf_gdn.patched():
        assert_close("gradients", gradients(), wanted, GRADIENT)


def test_the_wrong_cache_is_refused(model):
    ids, _ = tiny.batch()
    cache = DynamicCache(config=model.config)
    with hf_gdn.patched():
        logits(model, ids[:2], **tiny.given(cache))
        before = [cache.layers[0].conv_states[0].clone(), cache.layers[0].recurrent_states[0].clone()]
        with pytest.raises(ValueError, match=r"layer 0: the cache's recurrent state must be .* got \[2, "):
            tiny.mixer(model)(torch.randn(3, 1, 32), **tiny.layer_given(tiny.mixer(model), cache))
    assert torch.equal(before[0], cache.layers[0].conv_states[0])
    assert torch.equal(before[1], cache.layers[0].recurrent_states[0])


def test_what_the_mixer_cannot_serve_goes_to_the_original(model, caplog, monkeypatch):
    layer, x = tiny.mixer(model), torch.randn(1, 5, 32)
    wanted = layer(x)
    monkeypatch.setattr(log, "warned", set())
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with hf_gdn.patched(), caplog.at_level(logging.WARNING, "hf_gdn"):
        for _ in range(2):
            assert_close("original", layer(x), wanted, SAME_SUMS)
    (said,) = (record.getMessage() for record in caplog.records if record.name.startswith("hf_gdn"))
    assert "the original forward runs: torch.export" in said
    with hf_gdn.patched(strict=True), pytest.raises(BackendError, match="cannot serve this call: torch.export"):
        layer(x)


@tiny.mainly("qwen3_next", "kimi_linear")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiles_without_a_break(family, backend):
    """With a static cache, as generate() does: decode steps through inductor, prefill and pieces through dynamo."""
    if backend == "inductor" and family not in ("qwen3_next", "kimi_linear"):
        pytest.skip("inductor takes a minute for a family, and sees the same operators in all of a variant")
    tiny.skip_what_it_cannot(family, "`torch.compile(fullgraph=True)`")
    torch._dynamo.reset()
    model = tiny.model(family)
    model.set_experts_implementation("batched_mm")  # one that can be traced
    ids, _ = tiny.batch(rows=1, length=20)
    wanted = logits(model, ids)
    hf_gdn.patch()
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=32)
    parts = []
    with torch.no_grad():
        for first, last in pairwise((0, 16, 17, 18, 20) if backend == "eager" else (0, 16, 17, 18, 19, 20)):
            run = model if backend == "inductor" and first == 0 else step
            positions = torch.arange(first, last)[None]
            parts.append(run(ids[:, first:last], **tiny.given(cache), position_ids=positions).logits.clone())
    assert_close("compiled", torch.cat(parts, 1), wanted, LAYER)


@tiny.mainly("qwen3_next", "kimi_linear", "olmo_hybrid")
def test_compiles_with_symbols_for_sizes(family):
    """What is compiled with dynamic=True serves any batch and length, with and without gradients."""
    torch._dynamo.reset()
    layer, xs = tiny.mixer(tiny.model(family)), [torch.randn(2, 40, 32), torch.randn(3, 33, 32)]
    with hf_gdn.patched(strict=True):
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for x in xs:
                    assert_close(str(grad), compiled(x), layer(x), LAYER)


@pytest.mark.gpu
def test_on_a_gpu(family):
    """The Triton kernels inside a model: prefill, pieces and decode against the original on the same card."""
    model = tiny.model(family).cuda()
    ids, mask = (x.cuda() for x in tiny.batch())
    wanted = logits(model, ids, attention_mask=mask)[mask.bool()]
    pieces = decode(model, ids, [40, 1, 1, 3, 1, 24])
    with hf_gdn.patched(backend="triton", strict=True):
        assert_close("prefill", logits(model, ids, attention_mask=mask)[mask.bool()], wanted, LAYER)
        assert_close("decode", decode(model, ids, [40, 1, 1, 3, 1, 24]), pieces, LAYER)
