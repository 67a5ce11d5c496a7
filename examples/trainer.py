"""Fine-tune a patched model with transformers' Trainer.

    python examples/trainer.py --steps 20
    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \\
        examples/trainer.py --model Qwen/Qwen3.5-9B --output tuned

Weights, gradients and AdamW's moments are fp32, 16 bytes a parameter, which FSDP shares out among the processes.
On the embedded model it prints the kernels that the layers train on, and loss before and after:

    kernels: chunk_gdn: eager, backward_gdn: eager
    loss of the first step 2.45, of the last 1.96
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_gdn
from hf_gdn.loading.models import ASSETS
from hf_gdn.patches import layer_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "qwen3_next-tiny"), help="folder or hub name")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="tuned", help="folder for the tuned model")
    given = parser.parse_args()

    hf_gdn.patch()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    text = "\n\n".join(path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    rows = [{"input_ids": row, "labels": row} for row in ids.split(128) if len(row) == 128]

    arguments = TrainingArguments(
        output_dir=given.output, max_steps=given.steps, per_device_train_batch_size=4, learning_rate=1e-3,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        bf16=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(given.output)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print("kernels:", *sorted(set(layer_kernels(model, needs_grad=True).values())))
    print(f"loss of the first step {float(losses[0]):.2f}, of the last {float(losses[-1]):.2f}")


if __name__ == "__main__":
    main()
