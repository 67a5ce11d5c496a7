"""The ops in plain PyTorch: any device, any float dtype; all but `step` are differentiable."""
