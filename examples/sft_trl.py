"""Supervised fine-tuning with TRL's SFTTrainer and packing: documents share rows, and stay apart.

    pip install trl
    python examples/sft_trl.py --steps 20
    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \\
        examples/sft_trl.py --model Qwen/Qwen3.5-9B --output tuned

TRL packs documents into rows and gives positions that restart; in a patched model they also cut the linear-attention
layers, in which the original mixes documents. Its warning about other attention implementations than flash attention
does not apply to those. On the embedded model it prints how documents were packed, and loss before and after:

    packed: 159 documents in 62 rows
    loss of the first step 2.50, of the last 2.25
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hf_gdn
from hf_gdn.loading.models import ASSETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "qwen3_next-tiny"), help="folder or hub name")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="tuned", help="folder for the tuned model")
    given = parser.parse_args()

    hf_gdn.patch()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    files = sorted(Path(json.__file__).parent.glob("*.py"))
    documents = [part for path in files for part in path.read_text().split("\n\n")]
    arguments = SFTConfig(
        output_dir=given.output, max_steps=given.steps, per_device_train_batch_size=1, learning_rate=1e-3,
        packing=True, max_length=256, gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, bf16=torch.cuda.is_available(),
    )  # fmt: skip
    data = Dataset.from_dict({"text": documents})
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    print(f"packed: {len(documents)} documents in {len(trainer.train_dataset)} rows")
    trainer.train()
    trainer.save_model(given.output)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"loss of the first step {float(losses[0]):.2f}, of the last {float(losses[-1]):.2f}")


if __name__ == "__main__":
    main()
