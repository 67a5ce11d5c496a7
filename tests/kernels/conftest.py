"""What tests of kernels in Triton's interpreter share."""

import pytest
import torch


@pytest.fixture
def rounded_bf16(monkeypatch):
    """The interpreter cuts fp32 off to bf16, where every card rounds: three times the error, and all to one side."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(x, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
