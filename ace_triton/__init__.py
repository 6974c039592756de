"""Fused Triton kernels that prune large language models to N:M sparsity and run them sparse."""
