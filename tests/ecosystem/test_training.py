"""Trainings end where the original's end: LoRA and its merge, Trainer, checkpointing, bf16 autocast."""

import copy

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import hf_gdn
from hf_gdn.testing import assert_close, error
from hf_gdn.testing.tolerances import GRADIENT, LAYER
from tests import tiny_models as tiny
from tests.ecosystem.common import TWO, assert_same_training, counting, logits, parameters

IDS, _ = tiny.batch()
STEPS = 3


def lora(family, **options):
    model = tiny.model(family)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=tiny.projections(model), **options))


def train(model, lr):
    """Losses of some steps of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    model.train()
    losses = []
    for step in range(STEPS):
        ids, _ = tiny.batch(seed=step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    model.eval()
    return torch.stack(losses)


def test_lora_trains_and_merges(family):
    start = parameters(lora(family))
    original = lora(family)
    wanted = train(original, lr=1.0)
    with hf_gdn.patched(strict=True):
        model = lora(family)
        got = train(model, lr=1.0)
        # The same model, up to the two trainings' rounding: a loss is at most as far off as logits and parameters are.
        assert_close("losses", got, wanted, LAYER + GRADIENT)
        assert_same_training("adapters", parameters(model), parameters(original), start, STEPS)
        # Merging adds B A to the weights: the same function, rounded once more.
        apart = logits(model, IDS)
        merged = model.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_modules())
        assert_close("merged", logits(merged, IDS), apart, LAYER)
    assert_close("merged, original forward", logits(merged, IDS), apart, LAYER)


@pytest.mark.parametrize("kind", ["all_linear", "dora", "ia3"])
@pytest.mark.parametrize("family", TWO)
def test_other_adapters(family, kind):
    model = tiny.model(family)
    plain, names = logits(model, IDS), tiny.projections(model)
    config = {
        "all_linear": LoraConfig(target_modules="all-linear", init_lora_weights=False),
        "dora": LoraConfig(target_modules=names, use_dora=True, init_lora_weights=False),
        "ia3": IA3Config(target_modules=names, feedforward_modules=[], init_ia3_weights=False),
    }[kind]
    torch.manual_seed(1)
    model = get_peft_model(model, config).eval()
    wanted = logits(model, IDS)
    assert error(wanted, plain) > 1e-2
    with hf_gdn.patched(strict=True):
        assert_close("logits", logits(model, IDS), wanted, LAYER)


def norm_of(layer):
    """Name of the child that is the gated norm."""
    return next(name for name, child in layer.named_children() if "RMSNormGated" in type(child).__name__)


def test_full_copies_of_directly_read_modules_are_used(family):
    """modules_to_save puts a wrapper with a trained copy where the norm was."""
    model = lora(family, modules_to_save=[norm_of(tiny.mixer(tiny.model(family)))])
    plain = logits(model, IDS)
    for name, p in model.named_parameters():
        if "modules_to_save" in name:
            p.data.mul_(1.5)
    wanted = logits(model, IDS)
    assert error(wanted, plain) > 1e-2
    with hf_gdn.patched(strict=True):
        assert_close("logits", logits(model, IDS), wanted, LAYER)


@pytest.mark.parametrize("family", TWO)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_tuned_norms(family):
    """PEFT's LayerNorm tuning wraps norms in a module that has a weight and a forward, and nothing else."""
    model = tiny.model(family)
    config = LNTuningConfig(target_modules=[norm_of(tiny.mixer(model))])
    model = get_peft_model(model, config)
    wanted = train(copy.deepcopy(model), lr=1.0)
    with hf_gdn.patched(strict=True):
        assert_close("losses", train(model, lr=1.0), wanted, LAYER + GRADIENT)


def trainer(family, folder, **options):
    """Parameters before and after some steps of transformers' Trainer."""
    model = tiny.model(family)
    start = parameters(model)
    rows = [{"input_ids": row, "labels": row} for row in tiny.batch(rows=2 * STEPS, length=40)[0]]
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=2, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", logging_strategy="no",
        report_to=[], disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    return start, parameters(model)


# Warnings of transformers about names of its own arguments.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

CHECKPOINTING = {
    "plain": {},
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "non_reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
}


@pytest.mark.parametrize("checkpointing", list(CHECKPOINTING))
@pytest.mark.parametrize("family", TWO)
def test_trainer(family, checkpointing, tmp_path):
    options = CHECKPOINTING[checkpointing]
    start, wanted = trainer(family, tmp_path, **options)
    with hf_gdn.patched(strict=True), counting() as calls:
        _, got = trainer(family, tmp_path, **options)
    # Three layers a step, and once more in the backward where activations are computed again.
    assert len(calls) == 3 * STEPS * (2 if options else 1)
    assert_same_training("parameters", got, wanted, start, STEPS)


@pytest.fixture(scope="module", params=TWO)
def in_fp32(request, tmp_path_factory):
    """A family, and its parameters before and after the original's training in fp32."""
    return request.param, *trainer(request.param, tmp_path_factory.mktemp("fp32"))


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_trainer_in_bf16(in_fp32, checkpointing, tmp_path):
    """Under autocast the parameters end no further from fp32's than twice as far as the original's do."""
    family, start, exact = in_fp32
    options = dict(CHECKPOINTING[checkpointing], bf16=True)
    _, wanted = trainer(family, tmp_path, **options)
    with hf_gdn.patched(strict=True):
        _, got = trainer(family, tmp_path, **options)

    def moved(end):
        return torch.cat([(end[name] - start[name]).flatten() for name in start])

    budget = 2 * error(moved(wanted), moved(exact))
    assert 1e-4 < budget < 0.5  # bf16 was used, and the bound still says something
    assert_close("movement", moved(got), moved(exact), budget)


def test_autocast_of_a_layer(family):
    """Output and gradients under bf16 autocast are no further from float64's than twice the original's.

    Root mean squares over some inputs: gradients of four numbers (dt_bias, A_log) are off by sheer luck.
    """
    layer = tiny.mixer(tiny.model(family))
    inputs = [torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]

    def run(layer, x, autocast):
        layer = copy.deepcopy(layer)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x)
        assert out.dtype == (torch.bfloat16 if autocast else x.dtype)
        out.to(x.dtype).square().sum().backward()
        return {"output": out.detach(), **{name: p.grad for name, p in layer.named_parameters()}}

    def runs(layer, dtype=torch.float32, autocast=True):
        rows = [run(layer, x.to(dtype), autocast) for x in inputs]
        return {name: torch.cat([row[name].flatten() for row in rows]) for name in rows[0]}

    exact = runs(copy.deepcopy(layer).double(), torch.float64, autocast=False)
    wanted = runs(layer)
    with hf_gdn.patched(strict=True):
        got = runs(layer)
    for name, original in wanted.items():
        assert_close(name, got[name], exact[name], 2 * error(original, exact[name]))
