"""How a sequence of tokens begins: with the tokenizer's beginning-of-text token (BOS), or without.

A model that was trained with a BOS before every text predicts badly without it, and its statistics are of inputs that
it never sees in use. Calibration, evaluation and recovery all begin their sequences as a :class:`Beginning` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..errors import TextError
from ..out_of_memory import raise_if_out_of_memory

Bos = Literal["auto", "each", "stream", "none"]
"""What a user may ask for: a BOS at the start of ``each`` sequence, one at the start of the whole text before it is cut
(``stream``, as the papers evaluate), or ``none``. ``auto`` is ``each`` if the tokenizer adds one itself, else ``none``.
"""


@dataclass(frozen=True)
class Beginning:
    """What sequences begin with.

    Attributes:
        mode: "each", "stream" or "none".
        tokens: ids of the beginning, most often a single BOS; empty for "none".
    """

    mode: Literal["each", "stream", "none"] = "none"
    tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, bos: Bos = "auto") -> Beginning:
        """How sequences of this tokenizer begin.

        Raises:
            TextError: ``bos`` is unknown, or it is "each" and the tokenizer has no BOS.
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
        """The tokens at the start of every sequence."""
        return self.tokens if self.mode == "each" else ()

    def text_length(self, length: int) -> int:
        """Tokens of text in a sequence of ``length`` tokens; TextError if there is no room for one."""
        room = length - len(self.of_each)
        if room < 1:
            raise TextError(f"a sequence of {length} tokens has no room for text after {self}: give a larger --length")
        return room

    def before(self, sequences: torch.Tensor) -> torch.Tensor:
        """int64 [n_sequences, length] with :attr:`of_each` in front of every row."""
        if not self.of_each:
            return sequences
        return torch.cat([sequences.new_tensor(self.of_each).expand(len(sequences), -1), sequences], 1)

    def before_stream(self, stream: torch.Tensor) -> torch.Tensor:
        """int64 [n_tokens], a whole text, with the tokens in front if the mode is "stream"."""
        return torch.cat([stream.new_tensor(self.tokens), stream]) if self.mode == "stream" else stream

    def __str__(self) -> str:
        """As "each (1)", with the token ids; or "none"."""
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
    """The special tokens that a tokenizer puts before a text by itself; empty if there are none."""
    whole = token_ids(tokenizer, "a")
    plain = token_ids(tokenizer, "a", add_special_tokens=False)
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return tuple(whole[:1]) if whole and whole[0] == tokenizer.bos_token_id else ()


def text_ids(text: str, tokenizer: Any, beginning: Beginning) -> torch.Tensor:
    """A whole text's token ids to cut into windows, int64 [n_tokens]; its own beginning is there only for "stream"."""
    ids = token_ids(tokenizer, text, verbose=False)
    own = own_beginning(tokenizer)
    if beginning.mode != "stream" and tuple(ids[: len(own)]) == own:
        ids = ids[len(own) :]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")
