"""``triton`` and ``tl`` for the modules with Triton kernels, or stand-ins if triton is not installed.

With the stand-ins, those modules can be imported; :func:`~ace_triton.kernels.backend.choose_backend` then never chooses
Triton.
"""

from __future__ import annotations

from types import SimpleNamespace

from .backend import HAS_TRITON

if HAS_TRITON:
    import triton
    import triton.language as tl
else:
    triton = SimpleNamespace(
        jit=lambda body=None, **options: body or (lambda body: body), constexpr_function=lambda body: body
    )
    tl = None

__all__ = ["tl", "triton"]
