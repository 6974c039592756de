"""Fused kernels of ace_triton, one operation per module; installed as ``ace_triton.kernels``.

Import operations from their modules (``from ace_triton.kernels.moments import moments``). This file imports nothing on
purpose: transformers looks for a package called ``kernels`` and, in the root of this repository, imports this folder.
"""
