"""Test data for the operations. Tests call the public launchers, so they check the backend that the device uses."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import pytest
import torch

from ace_triton.kernels.backend import ENVIRONMENT_VARIABLE, interpreting
from ace_triton.kernels.score_terms import ScoreTerms

# Fewer examples: the interpreter is slow, and on a GPU nearly every example compiles new kernels.
FEW = interpreting() or torch.cuda.is_available()
hypothesis.settings.register_profile("kernels", deadline=None, max_examples=15 if FEW else 60, derandomize=True)
hypothesis.settings.load_profile("kernels")

if interpreting():
    from tests.kernels.interpreter_speed import search_builtins_once

    search_builtins_once()

# "ties" draws from few values; "special" mixes in signed zeros, subnormals, extremes and infinities.
VALUES = ("normal", "ties", "special")

MakeWeight = Callable[..., torch.Tensor]
MakeTerms = Callable[..., ScoreTerms]


@pytest.fixture
def chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is chosen by the tensors' device, whatever the environment says."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture(scope="session", params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_matrix(device: str) -> MakeWeight:
    """make_matrix(rows, cols, dtype, values, seed): a random matrix; ``values`` is one of VALUES."""

    def make(rows: int, cols: int, dtype: torch.dtype, values: str = "normal", seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if values == "ties":
            few = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.0, 2.0])
            return few[torch.randint(len(few), (rows, cols), generator=generator)].to(dtype).to(device)
        matrix = torch.randn(rows, cols, generator=generator)
        if values == "special":
            kind = torch.finfo(dtype)
            special = torch.tensor(
                [0.0, -0.0, kind.smallest_normal / 4, -kind.smallest_normal / 2, kind.max, -torch.inf, torch.inf]
            )
            drawn = special[torch.randint(len(special), (rows, cols), generator=generator)]
            matrix = torch.where(torch.rand(rows, cols, generator=generator) < 0.5, drawn, matrix)
        return matrix.to(dtype).to(device)

    return make


@pytest.fixture(scope="session")
def make_terms(device: str) -> MakeTerms:
    """make_terms(rows, cols, present, power, seed): positive terms for the names in ``present``."""

    def make(rows: int, cols: int, present: tuple[str, ...] = (), power: int = 1, seed: int = 0) -> ScoreTerms:
        generator = torch.Generator().manual_seed(seed + 1)
        shapes = {"row": (rows,), "col": (cols,), "scale": (cols,), "coupling": (rows, cols)}
        drawn = {name: torch.rand(shape, generator=generator) + 0.1 for name, shape in shapes.items()}
        return ScoreTerms(**{name: drawn[name].to(device) for name in present}, power=power)

    return make
