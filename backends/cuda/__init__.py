"""PyTorch: on an NVIDIA GPU, or on a CPU."""
