"""Train the two tiny language models shipped in ``hf_gdn/loading/assets``.

A Qwen3-Next and a Kimi-Linear model learn the standard library's source code, so
that perplexity on its held-out modules reacts when a replaced kernel is wrong.

    python scripts/train_tiny.py --family both --minutes 35
    python scripts/train_tiny.py --check

``--minutes`` anneals the learning rate over wall time; ``--steps`` makes a run
repeatable.  The check measures the saved bfloat16 weights, loaded in float32:
held-out perplexity, as it is and with the recurrent state cut every 64 tokens.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from unittest.mock import patch

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers import PreTrainedModel as Model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_gdn.loading.stdlib_text import held_out_text, stdlib_files  # noqa: E402

END, END_ID, VOCABULARY = "<|endoftext|>", 0, 1024
WINDOW, BATCH, LEARNING_RATE, EVAL_WINDOWS, CUT = 512, 3, 3e-3, 64, 64
MAX_BYTES, MAX_PERPLEXITY, MIN_RISE = 4_000_000, 14.0, 1.02

ZEROED = ("A_log", "out_proj.weight", "o_proj.weight", "down_proj", "down_proj.weight")
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=384,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    layer_types=["linear_attention"] * 3 + ["full_attention"],
    num_attention_heads=2,
    num_experts_per_tok=2,
    linear_conv_kernel_dim=4,
    max_position_embeddings=4096,
    bos_token_id=END_ID,
    eos_token_id=END_ID,
    pad_token_id=END_ID,
)
CONFIGS = dict(  # in both the first layer is dense, the others are mixtures of experts
    qwen3_next=dict(
        num_key_value_heads=1,
        head_dim=32,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        mlp_only_layers=[0],
        num_experts=4,
        shared_expert_intermediate_size=128,
        tie_word_embeddings=True,
    ),
    kimi_linear=dict(
        num_key_value_heads=2,
        linear_head_dim=32,
        linear_num_heads=4,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        num_local_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.0,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    ),
)
MODELS = "transformers.models"
KERNELS = {  # the chunked functions that the linear attention layers call
    "qwen3_next": f"{MODELS}.qwen3_next.modeling_qwen3_next.torch_chunk_gated_delta_rule",
    "kimi_linear": f"{MODELS}.kimi_linear.modeling_kimi_linear.chunk_kimi_delta_attention",
}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary; encoding adds no special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    start = {"special_tokens": [END], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, **start)
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": END, "eos_token": END, "pad_token": END, "model_max_length": 4096}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def batches(stream: Tensor) -> Iterator[Tensor]:
    """Yield batches of windows forever; an epoch reads each token at most once."""
    while True:
        windows = stream[int(torch.randint(WINDOW, ())) :].unfold(0, WINDOW, WINDOW)
        for picked in torch.randperm(len(windows)).split(BATCH):
            yield windows[picked]


def prepare(model: Model) -> torch.optim.Optimizer:
    """Initialise decays and output projections, balance routers, return the optimizer.

    The linear heads start with half-lives of about 2 to 700 tokens; the usual ones
    are mostly far shorter.  A router's correction bias, which has no gradient,
    moves towards experts with less than the average load.
    """

    def rebalance(router: torch.nn.Module, inputs: tuple, outputs: tuple) -> None:
        if router.training:
            load = torch.bincount(outputs[2].flatten(), minlength=router.num_experts).float()
            router.e_score_correction_bias += 1e-3 * (load.mean() - load).sign()

    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.register_forward_hook(rebalance)
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if name.endswith(ZEROED):
            torch.nn.init.zeros_(parameter)
        elif name.endswith("dt_bias"):
            parameter.data = torch.logspace(-3, -0.5, parameter.numel()).expm1().log()
        (plain if parameter.ndim < 2 or name.endswith("A_log") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def factored_kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **_: object) -> tuple:
    """Kimi delta attention for training only, several times faster on a CPU.

    Within 16 tokens the decay between two of them is split into a factor for each,
    kept finite by a limit of exp(-4) per token, so that matrix products suffice.
    """
    q, k = F.normalize(q, dim=-1) * k.shape[-1] ** -0.5, F.normalize(k, dim=-1)
    parts = (x.transpose(1, 2).unflatten(2, (-1, 16)) for x in (q, k, v, g, beta.unsqueeze(-1)))
    q, k, v, g, beta = parts
    decay = g.clamp(min=-4.0).cumsum(-2)
    last, fade, source = decay[..., -1:, :], decay.exp(), (k * (-decay).exp()).mT
    q, erase = q * fade, k * beta * fade
    inner, system = (q @ source).tril(), (erase @ source).tril(-1)
    solved = torch.cat((v * beta, erase), -1)
    solved = torch.linalg.solve_triangular(system, solved, upper=False, unitriangular=True)
    values, reads = solved.chunk(2, -1)
    written, kept = (k * (last - decay).exp()).mT, last.exp().mT
    state, outputs = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]), []
    for i in range(v.shape[2]):
        new = values[:, :, i] - reads[:, :, i] @ state
        outputs.append(q[:, :, i] @ state + inner[:, :, i] @ new)
        state = state * kept[:, :, i] + written[:, :, i] @ new
    return torch.cat(outputs, 2).transpose(1, 2), None


def train(family: str, stream: Tensor, args: argparse.Namespace) -> Model:
    """Train one model until the step or time budget is used up."""
    torch.manual_seed(args.seed)
    config = AutoConfig.for_model(family, **COMMON, **CONFIGS[family])
    model = AutoModelForCausalLM.from_config(config).train()
    model.set_experts_implementation("eager")
    optimizer, data = prepare(model), batches(stream)
    kernel, options = resolve_name(KERNELS[family]), {"output_router_logits": True}
    if family == "kimi_linear":  # has a slow kernel, and routers that balance without a loss
        kernel, options = factored_kda, {}
    running, step, began = math.log(VOCABULARY), 0, time.monotonic()
    with patch(KERNELS[family], kernel):
        while True:
            minutes = (time.monotonic() - began) / 60
            done = step / args.steps if args.steps else minutes / args.minutes
            if done >= 1:
                return model.eval()
            ramp, cosine = min(1.0, (step + 1) / 60), 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * ramp * cosine
            tokens = next(data)
            loss = model(input_ids=tokens, labels=tokens, use_cache=False, **options).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            running += (loss.item() - running) * max(0.02, 1 / step)
            if step % 20 == 0:
                rate = f"{step / (time.monotonic() - began):.2f} steps/s"
                print(f"{family} step {step} {rate} loss {running:.3f}", flush=True)


def save(model: Model, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Store the weights in bfloat16; buffers are rounded too but stay float32."""
    for buffer in model.bfloat16().buffers():
        buffer.data = buffer.data.float()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def cut_state(kernel: Callable) -> Callable:
    """Wrap a chunked kernel so that every ``CUT`` tokens start from an empty state."""

    def cut(*qkv: Tensor, g: Tensor, beta: Tensor, initial_state: None, **options: object) -> tuple:
        pieces = zip(*(x.split(CUT, 1) for x in (*qkv, g, beta)), strict=True)
        outputs = [kernel(*q, g=g, beta=beta, **options)[0] for *q, g, beta in pieces]
        return torch.cat(outputs, 1), None

    return cut


@torch.inference_mode()
def perplexity(model: Model, windows: Tensor) -> float:
    """Perplexity of one pass over windows whose first token is not scored."""
    losses = [model(input_ids=x, labels=x, use_cache=False).loss for x in windows.split(1)]
    return math.exp(torch.stack(losses).mean().item())


def check(family: str, directory: Path) -> bool:
    """Measure the saved files, print a JSON line and tell whether all goals are met."""
    tokenizer, text = AutoTokenizer.from_pretrained(directory), held_out_text()
    ids = tokenizer(text, verbose=False)["input_ids"]
    raw = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    windows = torch.tensor(ids).unfold(0, WINDOW, WINDOW)
    windows = windows[:: math.ceil(len(windows) / EVAL_WINDOWS)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    plain = perplexity(model, windows)
    with patch(KERNELS[family], cut_state(resolve_name(KERNELS[family]))):
        cut = perplexity(model, windows)
    file, bias = directory / "model.safetensors", "e_score_correction_bias"
    size = file.stat().st_size
    stored = [x for name, x in sorted(load_file(file).items()) if name.endswith(bias)]
    loaded = [x for name, x in sorted(model.named_buffers()) if name.endswith(bias)]
    goals = {
        "tokenizer": ids == raw and tokenizer.decode(ids) == text and END_ID not in ids,
        "bias": all(a.equal(b) and a.any() for a, b in zip(stored, loaded, strict=True)),
        "size": size <= MAX_BYTES,
        "perplexity": plain < MAX_PERPLEXITY,
        "state": cut > plain * MIN_RISE,
    }
    report = {"family": family, "parameters": model.num_parameters(), "bytes": size}
    report |= {"windows": len(windows), "perplexity": plain, "perplexity_state_cut": cut}
    report["failed"] = [name for name, met in goals.items() if not met]
    print(json.dumps(report), flush=True)
    return all(goals.values())


def main() -> int:
    """Train and check, or only check, the chosen families; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=[*CONFIGS, "both"], default="both")
    parser.add_argument("--output", type=Path, default=ROOT / "hf_gdn" / "eval" / "assets")
    parser.add_argument("--minutes", type=float, default=35.0, help="training time per model")
    parser.add_argument("--steps", type=int, help="training steps, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="only check the saved models")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    families = list(CONFIGS) if args.family == "both" else [args.family]
    if not args.check:
        texts = [p.read_text(encoding="utf-8", errors="replace") for p in stdlib_files()]
        tokenizer = train_tokenizer(texts)
        ids = tokenizer(texts, verbose=False)["input_ids"]
        stream = torch.tensor([token for text in ids for token in (*text, END_ID)])
        for family in families:
            save(train(family, stream, args), tokenizer, args.output / f"{family}-tiny")
    return sum(not check(name, args.output / f"{name}-tiny") for name in families)


if __name__ == "__main__":
    sys.exit(main())
