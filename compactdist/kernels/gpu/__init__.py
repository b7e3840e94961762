"""Triton kernels: for CUDA tensors, and interpreted for tests. Importing this imports Triton."""
