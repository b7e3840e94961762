"""Compiled kernels for CPU tensors."""
