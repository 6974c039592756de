"""What a structured pruning run removes, by which importance, and how the kept weights make up for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..errors import RecipeError

Update = Literal["lstsq", "bias", "none"]
UPDATES: dict[Update, str] = {
    "lstsq": "least squares on the layers that read what was removed",
    "bias": "the mean of what was removed goes into a bias, as in FLAP",
    "none": "kept weights stay as they are",
}


@dataclass(frozen=True)
class Method:
    """A structured method.

    Attributes:
        words: what it ranks by.
        update: the update of its published form.
        calibrated: True if it needs calibration text.
        options: names of the settings that apply to it alone.
    """

    words: str
    update: Update = "none"
    calibrated: bool = True
    options: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "saap": Method(
        "vector-wise and element-wise importance, fused by adaptive weights",
        "lstsq",
        options=("importance", "fusion", "stability"),
    ),
    "flap": Method("fluctuation of a channel's input times its squared weights", "bias"),
    "llm-pruner": Method("Taylor terms of the loss", options=("terms",)),
    "wanda-sp": Method("absolute weights times input norms, summed"),
    "magnitude": Method("norm of the structure's weights", calibrated=False),
    "depth": Method("1 - cosine of a block's input and output; removes whole blocks (ShortGPT)"),
}
"""The structured methods by name."""

CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "importance": ("activations", "taylor"),
    "fusion": ("structure", "mean", "learned", "vector", "element"),
    "terms": ("element", "vector", "second", "mixed"),
    "update": tuple(UPDATES),
    "experts": ("whole", "channels"),
    "widths": ("equal", "uneven"),
}
"""The allowed values of settings that are names; the first one is the default, except for ``update``."""


@dataclass(frozen=True)
class ShrinkSettings:
    """The settings of a structured pruning run.

    Attributes:
        ratio: least share of the blocks' parameters to remove, between 0 and 1. Widths are multiples, so more may go.
        size: largest size of the smaller model's checkpoint in bytes, instead of a ratio; None for the ratio.
        method: name in :data:`METHODS`.
        update: "lstsq", "bias" or "none"; None for that of the method's published form ("lstsq" for saap).
        speedup: how many times as fast a block must run on one token, measured here, instead of a ratio; None for the
            ratio. Method "depth" removes the share of the blocks that gives it.
        multiple: the feed-forward width that is left is a multiple of this.
        groups: number of key-value groups to remove from each block, each with its query heads. None to try all
            numbers that fit the ratio, and take the one with the lowest loss on the calibration text; without text, the
            smallest number.
        damping, prior: for "lstsq", as in :class:`~ace_triton.solvers.update.Update`.
        importance: for saap, "activations", or "taylor", which needs gradients and is the paper's.
        fusion: for saap, how vector-wise and element-wise importance become one score
            (:mod:`ace_triton.structures.fusion`); "vector" or "element" use one of them alone.
        stability: for saap, divide by 1 + the coefficient of variation over calibration batches, which is
            reconstructed.
        terms: for llm-pruner, "element" (sum of |g w|), "vector" (|sum of g w|), "second" (sum of |w F w|) or "mixed"
            (sum of |g w - w F w / 2|), with the gradient g and the Fisher diagonal F.
        experts: for mixtures, "whole" experts may go, or "channels" inside all of them, equally many of each.
        widths: "equal" feed-forwards in all blocks; or "uneven" ones by one ranking over all blocks, with as many
            parameters together, which :func:`ace_triton.load_model` loads, and plain transformers does not.

    Raises:
        RecipeError: if a setting is invalid, or does not apply to the method.
    """

    ratio: float = 0.2
    method: str = "saap"
    update: Update | None = None
    multiple: int = 64
    groups: int | None = None
    damping: float = 0.02
    prior: float = 512.0
    importance: str = "activations"
    fusion: str = "structure"
    stability: bool = False
    terms: str = "element"
    size: int | None = None
    speedup: float | None = None
    experts: str = "whole"
    widths: str = "equal"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio < 1:
            raise RecipeError(
                f"ratio must be between 0 and 1 (0.2 removes a fifth of the blocks' parameters); got {self.ratio!r}"
            )
        if self.speedup is not None:
            number = isinstance(self.speedup, (int, float)) and not isinstance(self.speedup, bool)
            if not number or not 1 < self.speedup < float("inf"):
                raise RecipeError(f"speedup must be a number above 1; got {self.speedup!r}")
            if self.size is not None or self.ratio != ShrinkSettings.ratio:
                raise RecipeError("give ratio, size or speedup, one of them")
        if self.size is not None:
            if type(self.size) is not int or self.size < 1:
                raise RecipeError(f"size must be a number of bytes of at least 1; got {self.size!r}")
            if self.ratio != ShrinkSettings.ratio:
                raise RecipeError(f"give ratio or size, one of them; got ratio={self.ratio:g}, size={self.size}")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "update" and value is None):
                raise RecipeError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        for name, least in (("multiple", 1), ("groups", 0)):
            value = getattr(self, name)
            if (value is None and name == "groups") or (type(value) is int and value >= least):
                continue
            raise RecipeError(f"{name} must be an integer of at least {least}; got {value!r}")
        for name in ("damping", "prior"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise RecipeError(f"{name} must be a number of at least 0; got {value!r}")
        if self.damping == self.prior == 0:
            raise RecipeError("damping and prior are both 0, so dependent channels have no unique solution: set one")
        self._check_method()

    def _check_method(self) -> None:
        if self.method == "depth":
            if self.update not in (None, "none"):
                raise RecipeError(
                    f"method 'depth' removes whole blocks, so no layer can make up for them: leave update out; got "
                    f"{self.update!r}"
                )
            if self.experts != "whole":
                raise RecipeError("method 'depth' removes whole blocks: leave experts out")
            if self.widths != "equal":
                raise RecipeError("method 'depth' removes whole blocks: leave widths out")
            if self.groups is not None:
                raise RecipeError("method 'depth' removes whole blocks: leave groups out")
        for name, method in METHODS.items():
            for option in method.options if name != self.method else ():
                if getattr(self, option) != getattr(ShrinkSettings, option):
                    raise RecipeError(f"{option} is a setting of method {name!r}; {self.method!r} does not have it")

    @property
    def chosen_update(self) -> Update:
        """The update that is used."""
        return METHODS[self.method].update if self.update is None else self.update

    @property
    def needs_text(self) -> bool:
        """True if the run needs calibration text."""
        return METHODS[self.method].calibrated or self.chosen_update != "none"

    @property
    def needs_gradients(self) -> bool:
        """True if the run needs gradients of the loss."""
        return self.method == "llm-pruner" or (self.method == "saap" and self.importance == "taylor")

    @property
    def needs_statistics(self) -> bool:
        """True if the run needs statistics of the dense model's inputs."""
        of_activations = self.method == "saap" and self.importance == "activations"
        return of_activations or self.method in ("flap", "wanda-sp") or self.chosen_update == "bias"

    @property
    def ranking(self) -> tuple[str, ...]:
        """The settings on which the importance of structures depends."""
        return (self.method, self.experts, *(str(getattr(self, option)) for option in METHODS[self.method].options))

    def to_dict(self) -> dict[str, Any]:
        """The settings that apply to the method, as JSON types."""
        others = {option for name, method in METHODS.items() if name != self.method for option in method.options}
        facts = {name: value for name, value in asdict(self).items() if name not in others}
        return {**facts, "update": self.chosen_update}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ShrinkSettings:
        """Settings from :meth:`to_dict`; RecipeError if an entry is unknown."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in record if name not in known]:
            raise RecipeError(f"structured pruning has no setting {unknown[0]!r}; its settings: {', '.join(known)}")
        return cls(**record)


def settings_of(
    settings: ShrinkSettings | None, ratio: float, method: str, options: Mapping[str, Any]
) -> ShrinkSettings:
    """Settings that are given as a whole, or as ratio, method and options; RecipeError if as both."""
    if settings is not None and (options or (ratio, method) != (ShrinkSettings.ratio, ShrinkSettings.method)):
        raise RecipeError("give settings, or ratio, method and options; not both")
    return settings or ShrinkSettings.from_dict({"ratio": ratio, "method": method, **options})
