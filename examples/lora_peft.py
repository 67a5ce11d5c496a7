"""Train LoRA adapters on a patched model's projections with PEFT, and merge them.

    python examples/lora_peft.py --steps 20

The adapters sit on the input and output projections of the linear-attention layers; everything between them is
hf_gdn's. On the embedded model it prints how much is trained, loss before and after, and how far the merged model's
logits are from those of the model with adapters:

    trained: 21,696 of 1,276,280 parameters
    loss of the first step 2.32, of the last 1.47
    merged: logits 2e-05 apart at most
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gdn
from hf_gdn.loading.models import ASSETS

PROJECTIONS = ["in_proj_qkvz", "in_proj_ba", "out_proj"]  # of Qwen3-Next's linear-attention layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "qwen3_next-tiny"), help="folder or hub name")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()

    hf_gdn.patch()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=PROJECTIONS))
    trained, total = model.get_nb_trainable_parameters()
    print(f"trained: {trained:,} of {total:,} parameters")

    text = Path(json.decoder.__file__).read_text()
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :512].view(4, 128)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(given.steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss of the first step {losses[0]:.2f}, of the last {losses[-1]:.2f}")

    with torch.no_grad():
        before, after = model(ids).logits, model.merge_and_unload()(ids).logits
    print(f"merged: logits {(before - after).abs().max():.0e} apart at most")


if __name__ == "__main__":
    main()
