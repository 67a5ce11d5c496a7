"""Patched models saved, loaded, pickled, copied, exported, compiled, in pipelines and in threads."""

import copy
import json
import pickle
import threading

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import hf_gdn
from hf_gdn.errors import BackendError
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import GRADIENT, LAYER
from tests import tiny_models as tiny
from tests.ecosystem.common import TWO, counting, logits, runs_ours

IDS, _ = tiny.batch()


def greedy(model, ids, tokens=6):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False)


# ------------------------------------------------------------------------------------------------ saved and copied


def saved(folder):
    """Config and weights of a folder, byte for byte."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found[path.name] = (file.metadata(), {name: file.get_tensor(name).tolist() for name in file.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize("family", TWO)
def test_saving_leaves_no_trace(family, tmp_path):
    tiny.model(family).save_pretrained(tmp_path / "original")
    with hf_gdn.patched():
        model = tiny.model(family)
        wanted = logits(model, IDS)
        model.save_pretrained(tmp_path / "patched")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
        assert torch.equal(logits(loaded, IDS), wanted)
        loaded.save_pretrained(tmp_path / "again")
    assert saved(tmp_path / "patched") == saved(tmp_path / "original") == saved(tmp_path / "again")
    assert "gdn" not in json.dumps(json.loads((tmp_path / "patched" / "config.json").read_text())).replace(family, "")


@pytest.mark.parametrize("how", ["pickle", "torch", "deepcopy"])
@pytest.mark.parametrize("family", TWO)
def test_copies_are_served_and_released(family, how, tmp_path):
    """A copy made of a patched model is one more model: patched now, original after unpatch."""
    model = tiny.model(family)
    wanted = logits(model, IDS)
    hf_gdn.patch(strict=True)
    ours = logits(model, IDS)
    if how == "pickle":
        data = pickle.dumps(model)
        assert b"hf_gdn" not in data  # it loads where hf_gdn is not installed
        twin = pickle.loads(data)
    elif how == "torch":
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        twin = copy.deepcopy(model)
    assert runs_ours(twin, IDS)
    assert torch.equal(logits(twin, IDS), ours)
    hf_gdn.unpatch()
    assert torch.equal(logits(twin, IDS), wanted)


# ------------------------------------------------------------------------------------------------------- in use


def words():
    """A tokenizer of 128 words, w0 to w127, whose ids are the tiny models'."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="w0", eos_token="w1", bos_token="w2", unk_token="w3", padding_side="left"
    )


@pytest.mark.parametrize("family", TWO)
def test_text_generation_pipeline(family):
    prompts = ["w5 w6 w7 w8 w9 w10", "w90 w20", " ".join(f"w{i}" for i in range(10, 100))]

    def run():
        generate = pipeline("text-generation", model=tiny.model(family), tokenizer=words(), device="cpu")
        rows = generate(prompts, batch_size=3, max_new_tokens=8, do_sample=False)
        return [row[0]["generated_text"] for row in rows]

    wanted = run()
    with hf_gdn.patched(strict=True), counting() as calls:
        assert run() == wanted
    assert calls


def test_two_models_in_threads():
    """Both families at once, prefill and decode, several times: to the bit what one thread gets."""
    pairs = [(tiny.model(family), tiny.batch(seed=seed)[0]) for seed in range(2) for family in TWO]
    hf_gdn.patch(strict=True)
    wanted = [(logits(model, ids), greedy(model, ids)) for model, ids in pairs]
    start, failures = threading.Barrier(len(pairs)), []

    def work(index):
        try:
            model, ids = pairs[index]
            start.wait()
            for _ in range(3):
                assert torch.equal(logits(model, ids), wanted[index][0])
                assert torch.equal(greedy(model, ids), wanted[index][1])
        except BaseException as error:
            failures.append((index, error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("family", TWO)
def test_threads_share_one_model_and_the_first_call(family):
    """Threads that are the first to ask the registry, with caches of their own on one model."""
    from hf_gdn import registry

    model = tiny.model(family)
    wanted = greedy(model, IDS)
    hf_gdn.patch(strict=True)
    registry._chosen.clear()
    found = [None] * 4
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, greedy(model, IDS))) for i in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(tokens is not None and torch.equal(tokens, wanted) for tokens in found)


# ------------------------------------------------------------------------------------------- exported and compiled


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "strict"),
    [("qwen3_next", True), ("kimi_linear", False)],
    ids=["qwen3_next-strict", "kimi_linear"],
)
def test_export_is_the_originals(family, strict):
    """The graph of a patched layer is the original's, operator by operator."""
    if strict:
        torch._dynamo.reset()
    layer = tiny.mixer(tiny.model(family)).requires_grad_(False)
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))

    def export():
        program = torch.export.export(layer, (x,), strict=strict)
        return [str(node.target) for node in program.graph.nodes], program.module()(x)

    wanted, result = export()
    with hf_gdn.patched():
        got, again = export()
    assert got == wanted and not any("hf_gdn" in target for target in got)
    assert torch.equal(again, result)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "trace", [lambda f, x: torch.jit.trace(f, (x,)), lambda f, x: make_fx(f)(x)], ids=["jit", "fx"]
)
@pytest.mark.parametrize("family", TWO)
def test_traces_are_the_originals(family, trace):
    """Kernels read and write memory by its address, which no trace shows."""
    layer = tiny.mixer(tiny.model(family)).requires_grad_(False)
    x, other = torch.randn(2, 1, 20, 32)
    wanted = trace(layer, x)(other)
    with hf_gdn.patched():
        assert torch.equal(trace(layer, x)(other), wanted)
    with hf_gdn.patched(strict=True), pytest.raises(BackendError, match=r"cannot serve this call: torch\.jit\.trace"):
        trace(layer, x)


@pytest.mark.parametrize("family", TWO)
def test_fake_tensors(family):
    layer = tiny.mixer(tiny.model(family)).requires_grad_(False)
    with hf_gdn.patched(), FakeTensorMode(allow_non_fake_inputs=True):
        out = layer(torch.randn(2, 20, 32))
        assert isinstance(out, FakeTensor) and out.shape == (2, 20, 32)


TWO_LAYERS = dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_training_steps_compile(family):
    """torch.compile of the whole model with gradients: loss and gradients of the original, uncompiled."""
    torch._dynamo.reset()
    ids, _ = tiny.batch(rows=1, length=20)

    def run(compiled):
        model = tiny.model(family, **TWO_LAYERS).train()
        model.set_experts_implementation("batched_mm")
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loss, gradients = run(False)
    with hf_gdn.patched(strict=True):
        got, again = run(True)
    assert_close("loss", got, loss, LAYER)
    assert_close("gradients", again, gradients, GRADIENT)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", TWO)
def test_layers_compiled_one_by_one(family):
    """`module.compile()` on decoder layers (regional compilation), after patch."""
    torch._dynamo.reset()
    model = tiny.model(family, **TWO_LAYERS)
    model.set_experts_implementation("batched_mm")
    wanted = logits(model, IDS[:1])
    hf_gdn.patch(strict=True)
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert_close("compiled", logits(model, IDS[:1]), wanted, LAYER)
