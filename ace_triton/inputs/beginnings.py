"""The beginning of a token sequence: with or without the tokenizer's beginning-of-text token (BOS).

A model that was trained with a BOS before every text predicts badly without it, and statistics collected without it are
of inputs that do not occur in use. Calibration, evaluation and recovery all use a :class:`Beginning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..errors import TextError
from ..out_of_memory import raise_if_out_of_memory

Bos = Literal["auto", "each", "stream", "none"]
"""Where to put a BOS: at the start of ``each`` sequence, once at the start of the whole text before it is cut
(``stream``, as papers evaluate), or ``none``. ``auto`` means ``each`` if the tokenizer adds a BOS itself, otherwise
``none``.
"""


@dataclass(frozen=True)
class Beginning:
    """The tokens that sequences begin with.

    Attributes:
        mode: "each", "stream" or "none".
        tokens: token ids of the beginning, usually a single BOS; empty for "none".
    """

    mode: Literal["each", "stream", "none"] = "none"
    tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, bos: Bos = "auto") -> Beginning:
        """Choose the beginning for a tokenizer.

        Raises:
            TextError: if ``bos`` is unknown, or it is "each" and the tokenizer has no BOS.
        """
        if bos not in get_args(Bos):
            raise TextError(f"bos {bos!r}: use {', '.join(get_args(Bos))}")
        own = own_beginning(tokenizer)
        if bos == "none" or (bos == "auto" and not own):
            return cls()
        if bos == "stream":
            return cls("stream", own)
        if not own and tokenizer.bos_token_id is None:
            raise TextError("bos 'each': this tokenizer has no beginning-of-text token; use 'none'")
        return cls("each", own or (tokenizer.bos_token_id,))

    @property
    def of_each(self) -> tuple[int, ...]:
        """Tokens at the start of every sequence; empty unless the mode is "each"."""
        return self.tokens if self.mode == "each" else ()

    def text_length(self, length: int) -> int:
        """Number of text tokens in a sequence of ``length`` tokens. Raises TextError if it is below 1."""
        room = length - len(self.of_each)
        if room < 1:
            raise TextError(f"a sequence of {length} tokens has no room for text after {self}: give a larger --length")
        return room

    def before(self, sequences: torch.Tensor) -> torch.Tensor:
        """Put :attr:`of_each` in front of every row of int64 [n_sequences, length]."""
        if not self.of_each:
            return sequences
        return torch.cat([sequences.new_tensor(self.of_each).expand(len(sequences), -1), sequences], 1)

    def before_stream(self, stream: torch.Tensor) -> torch.Tensor:
        """Put the tokens in front of a whole text, int64 [n_tokens], if the mode is "stream"."""
        return torch.cat([stream.new_tensor(self.tokens), stream]) if self.mode == "stream" else stream

    def __str__(self) -> str:
        """For example "each (1)", with the token ids, or "none"."""
        if self.mode == "none":
            return "none"
        return f"{self.mode} ({', '.join(map(str, self.tokens)) or 'the tokenizer adds none'})"


NO_BEGINNING = Beginning()


def token_ids(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    """A text's token ids as a list; of a list of texts, a list of such lists.

    Raises:
        TextError: the tokenizer fails.
    """
    try:
        return tokenizer(text, **options)["input_ids"]
    except Exception as error:  # The tokenizers library raises plain Exceptions.
        raise_if_out_of_memory(error)
        raise TextError(
            f"the model's tokenizer cannot tokenize the text ({error}): are its files complete, and the model's own?"
        ) from error


def own_beginning(tokenizer: Any) -> tuple[int, ...]:
    """Special tokens that a tokenizer adds before a text by itself; empty if it adds none."""
    whole = token_ids(tokenizer, "a")
    plain = token_ids(tokenizer, "a", add_special_tokens=False)
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return tuple(whole[:1]) if whole and whole[0] == tokenizer.bos_token_id else ()


def text_ids(text: str, tokenizer: Any, beginning: Beginning) -> torch.Tensor:
    """Token ids of a whole text, int64 [n_tokens]. The tokenizer's beginning is included only for "stream"."""
    ids = token_ids(tokenizer, text, verbose=False)
    own = own_beginning(tokenizer)
    if beginning.mode != "stream" and tuple(ids[: len(own)]) == own:
        ids = ids[len(own) :]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")
