"""How far a result may be from what is right, for every measurement. The tests' own are in `hf_gdn.testing.tolerances`.

Where each comes from stands beside it; docs/report.md has the derivation of the bounds of whole models and what broken
kernels reach.
"""

from __future__ import annotations

import torch

from ..testing.tolerances import DELTA_RULE, LAYER

# Relative Frobenius error of an op against the float64 oracle.
OP_ERROR = DELTA_RULE
# Of a layer against the original in the same dtype: both are rounded, and so are what their projections make: twice the
# op's in bf16, four times in fp16, whose own bar is tighter. In fp32 the projections are the same.
LAYER_ERROR = {torch.float32: LAYER, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
# Of the float64 eager kernel against the loop: sums of some 256 x 128 terms, 2^15 times 2^-53, and room for their
# chain.
EXACT_ERROR = 1e-10

# The largest differences that still count as the same model, by dtype. `ppl_ratio` bounds |PPL patched / PPL original -
# 1|, `kl_mean` the mean Kullback-Leibler divergence in nats, `same_top` (in per cent) is a lower bound.
SAME_MODEL = {
    "float32": {"ppl_ratio": 1e-4, "kl_mean": 1e-8, "same_top": 99.9},
    "float16": {"ppl_ratio": 2e-3, "kl_mean": 1e-4, "same_top": 99.0},
    "bfloat16": {"ppl_ratio": 2e-3, "kl_mean": 3e-3, "same_top": 96.0},
}
# Beyond its own dtype's bounds but within these a model is "close", not "different": a kernel that rounds where the
# original does not.
CLOSE_MODEL = {"float32": SAME_MODEL["bfloat16"], "float16": SAME_MODEL["bfloat16"]}

# Two tokens whose logits are so close that rounding decides between them: this many units of the dtype's epsilon times
# the largest logit. In fp32 the error is that of sums of thousands of terms, in 16 bits that of the last roundings.
TIE = {"float32": 64.0, "float16": 4.0, "bfloat16": 4.0}

# The largest differences that still count as the same training, by dtype of the weights. `gradient` bounds the relative
# error of a parameter group's gradient on the same weights: in fp32 ten times what the tests allow a tiny model, in
# bf16 twice what routers reach, whose experts flip (docs/report.md). `loss` bounds the relative difference of a step's
# losses in the median over steps, since one token that flips an expert moves one loss by 4e-4; `ppl_ratio` likewise
# |PPL patched / PPL original - 1| of a window held out, after training, in the median over windows.
SAME_TRAINING = {
    "float32": {"gradient": 1e-3, "loss": 1e-4, "ppl_ratio": 1e-4},
    "bfloat16": {"gradient": 4e-1, "loss": 5e-3, "ppl_ratio": 2e-3},
}
CLOSE_TRAINING = {"float32": SAME_TRAINING["bfloat16"]}
