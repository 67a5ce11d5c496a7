"""What tests of the step ops share."""

import torch

from hf_gdn.kernels import STEP_GDN, STEP_KDA

FAMILIES = {  # what differs between families
    "qwen3_next": (STEP_GDN, {}),
    "qwen4_exp": (STEP_GDN, dict(gate="sigmoid")),
    "olmo_hybrid": (STEP_GDN, dict(beta_scale=2.0, eps=1e-5)),
    "kimi_linear": (STEP_KDA, dict(gate="sigmoid", norm_in_fp32=True)),
    "glm5_next": (STEP_KDA, dict(gate="sigmoid", norm_in_fp32=True, lower_bound=-5.0)),
    "bailing_hybrid": (STEP_KDA, dict(gate="sigmoid", norm_in_fp32=True, lower_bound=-5.0, decay_in_dtype=True)),
}


def double(tensors):
    """A named tuple's tensors in float64."""
    return type(tensors)(*(x.double() if isinstance(x, torch.Tensor) else x for x in tensors))
