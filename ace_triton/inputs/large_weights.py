"""Lets transformers open a model whose weights stay in files without reading the large ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LARGE = 2**22
"""Weights with more elements are not converted. No buffer, which would need its dtype at once, is so large."""


@contextmanager
def large_weights_as_stored() -> Iterator[None]:
    """A context in which transformers does not convert the dtype of large weights.

    It would read and convert weights that stay in files, only to forget them. They are converted when they are used.
    """
    from transformers import core_model_loading

    loading: Any = core_model_loading
    own = getattr(loading, "spawn_materialize", None)
    if own is None:  # Another version of transformers: then it converts them.
        yield
        return

    def as_stored(pool: Any, tensor: Any, device: Any = None, dtype: Any = None, **others: Any) -> Any:
        shape = tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape
        return own(pool, tensor, device, None if math.prod(shape) > LARGE else dtype, **others)

    loading.spawn_materialize = as_stored
    try:
        yield
    finally:
        loading.spawn_materialize = own
