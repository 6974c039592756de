"""Fused kernels of ace_triton, one operation a module; installed as ``ace_triton.kernels``.

Import operations from their modules (``from ace_triton.kernels.moments import moments``). This file
imports nothing on purpose: run from the repository's root, transformers looks for a package called
``kernels`` and imports this folder under that name.
"""
