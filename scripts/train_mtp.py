"""Train the multi-token-prediction head of the embedded Qwen3-Next model, and add it to its checkpoint.

    python scripts/train_mtp.py --minutes 20
    python scripts/train_mtp.py --minutes 20 --go-on
    python scripts/train_mtp.py --check

The model is frozen. The head learns the model's own distribution of each token from the hidden state two tokens before
and the token between, then, `UNROLLED` deep, from its own output, as it drafts. Every other batch is text of the
training files, the others begin with such text and were continued by the model, since that is what it drafts for. It
is saved in the layout of the real checkpoints: ``mtp.*``, one tensor per expert. The check measures, on held-out text
and on the model's continuations of it, how often its most probable token is the model's.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hf_gdn  # noqa: E402
from hf_gdn.drafting.mtp_head import MtpHead, head_of, in_checkpoint_names  # noqa: E402
from hf_gdn.drafting.mtp_layer import Rotary  # noqa: E402
from hf_gdn.loading.stdlib_text import held_out_text, stdlib_files  # noqa: E402
from hf_gdn.upstream import mtp  # noqa: E402

ASSET = ROOT / "hf_gdn" / "loading" / "assets" / "qwen3_next-tiny"
WINDOW, BATCH, LEARNING_RATE, UNROLLED = 512, 3, 3e-3, 3
PROMPT, CONTINUED = 128, 512  # tokens of a text that the model continues; number of continued texts


def new_head(model: torch.nn.Module) -> MtpHead:
    """A head with random weights, its norms one."""
    config = mtp.head_config(model.config, experts=True)
    layer = mtp.make_layer(model, config).to_empty(device="cpu")
    for name, p in layer.named_parameters():
        if p.ndim == 1:
            torch.nn.init.zeros_(p)  # norms are 1 + w
        else:
            torch.nn.init.normal_(p, std=0.0 if "o_proj" in name or "down_proj" in name else p.shape[-1] ** -0.5)
    return MtpHead(layer.train())


def chained(head: MtpHead, model: torch.nn.Module, ids: Tensor, hidden: Tensor) -> list[Tensor]:
    """Hidden states of the head applied to its own output, depth k (from 0) at t predicting token t + 2 + k."""
    found, embeds = [], model.get_input_embeddings()(ids)
    rotary = Rotary.of(model, hidden, torch.arange(ids.shape[1])[None])
    for depth in range(1, UNROLLED + 1):
        count = ids.shape[1] - depth
        hidden = head.read(embeds[:, depth:], hidden[:, :count], rotary.part(0, count), None)
        found.append(hidden)
    return found


@torch.inference_mode()
def continued(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """Windows ``[N, WINDOW]`` whose tokens after the first `PROMPT` are the model's own choice."""
    found = []
    for prompts in windows[:, :PROMPT].split(64):
        given = {"attention_mask": torch.ones_like(prompts), "min_length": WINDOW, "max_length": WINDOW}
        found.append(model.generate(prompts, **given, do_sample=False))
        print(f"continued {sum(map(len, found))} texts", flush=True)
    return torch.cat(found).clone()


def train(model: torch.nn.Module, head: MtpHead, windows: Tensor, minutes: float) -> MtpHead:
    """Train a head until the time is up."""
    order = torch.randperm(len(windows))
    sources = windows[order], continued(model, windows[order[-CONTINUED:]])
    step, began, running = 0, time.monotonic(), [math.log(model.config.vocab_size)] * UNROLLED
    optimizer = torch.optim.AdamW(head.layer.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    while True:
        done = (time.monotonic() - began) / 60 / minutes
        if done >= 1:
            head.layer.eval()
            return head
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 60) * 0.5 * (1 + math.cos(math.pi * done))
        texts, turn = sources[step % 2], step // 2
        ids = texts[torch.arange(turn * BATCH, (turn + 1) * BATCH) % len(texts)]
        with torch.no_grad():
            hidden = model.model(ids, use_cache=False).last_hidden_state
            wanted = model.lm_head(hidden).softmax(-1)
        losses = []
        for depth, drafted in enumerate(chained(head, model, ids, hidden), start=1):
            logits = model.lm_head(drafted)
            losses.append(F.cross_entropy(logits.flatten(0, 1), wanted[:, depth:].flatten(0, 1)))
        optimizer.zero_grad()
        sum(0.7**depth * loss for depth, loss in enumerate(losses)).backward()
        torch.nn.utils.clip_grad_norm_(head.layer.parameters(), 1.0)
        optimizer.step()
        step += 1
        running = [old + (new.item() - old) * max(0.02, 1 / step) for old, new in zip(running, losses)]
        if step % 20 == 0:
            print(f"step {step} done {done:.0%} losses", *(f"{value:.3f}" for value in running), flush=True)


def save(head: MtpHead) -> None:
    """Add the head to the model's checkpoint, in bfloat16."""
    path = ASSET / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: value for name, value in load_file(path).items() if not name.startswith("mtp.")}
    tensors |= {name: value.bfloat16().contiguous() for name, value in in_checkpoint_names(head).items()}
    save_file(tensors, path, metadata)


@torch.inference_mode()
def check() -> dict:
    """How often the head's most probable token is the model's, by depth, on held-out text."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32),
        AutoTokenizer.from_pretrained(ASSET),
    )
    head = head_of(model)
    windows = torch.tensor(tokenizer(held_out_text(), verbose=False)["input_ids"]).unfold(0, WINDOW, WINDOW)[::32]
    found = {"parameters": sum(p.numel() for p in head.layer.parameters()), "windows": len(windows)}
    for name, texts, first in [("text", windows, 0), ("continued", continued(model, windows), PROMPT)]:
        right, count = [0] * UNROLLED, 0
        for ids in texts.split(1):
            hidden = model.model(ids, use_cache=False).last_hidden_state
            top = model.lm_head(hidden).argmax(-1)
            for depth, drafted in enumerate(chained(head, model, ids, hidden), start=1):
                same = model.lm_head(drafted).argmax(-1) == top[:, depth:]
                right[depth - 1] += int(same[:, first:].sum())
            count += ids.shape[1] - first
        found[f"same_top_{name}"] = [round(n / count, 4) for n in right]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="training time")
    parser.add_argument("--go-on", action="store_true", help="start from the saved head")
    parser.add_argument("--check", action="store_true", help="only check the saved head")
    args = parser.parse_args()
    hf_gdn.patch()
    if not args.check:
        model = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32).requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(ASSET)
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files()]
        ids = tokenizer(texts, verbose=False)["input_ids"]
        stream = torch.tensor([token for text in ids for token in (*text, tokenizer.eos_token_id)])
        windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
        torch.manual_seed(0)
        head = head_of(model) if args.go_on else new_head(model)
        head.layer.train().requires_grad_(True)
        save(train(model, head, windows, args.minutes))
    print(json.dumps(check()))


if __name__ == "__main__":
    main()
