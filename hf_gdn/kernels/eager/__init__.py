"""The ops in plain PyTorch, for any device and float dtype. All but `step` are differentiable."""
