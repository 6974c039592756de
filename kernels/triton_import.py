"""``triton`` and ``tl`` for the modules that hold Triton bodies, or stand-ins where triton is not installed.

The stand-ins let those modules import; :func:`~ace_triton.kernels.backend.choose_backend` never picks a
Triton body then.
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
