"""Calibration batches for models of any inputs: text with a mask, images and audio, by the model's own processors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..decoders.batches import TOKENS_OF_A_FORWARD, check_positions, positions_of
from ..errors import ArgumentError, CheckpointError
from ..out_of_memory import raise_if_out_of_memory
from .companions import Companions
from .masked_text import beginning_of, pad_of, padded, pieces_of
from .media import MediaFile, audio_files, image_files, read_audio, read_image

Inputs = dict[str, torch.Tensor]

AUDIO_INPUTS = ("input_features", "input_values")
GENERATES_TEXT = ("text-generation", "image-text-to-text")
"""Tasks of models that also run on text alone, although they can read images or audio."""

IMAGES_OF_A_FORWARD = 16
CAPTION_TOKENS = 64
"""Most tokens of a text beside an image or audio."""


@dataclass(frozen=True)
class Reads:
    """What the forward of a model reads.

    Attributes:
        arguments: names of its arguments.
        optional_media: True if the model also runs on text alone.
    """

    arguments: frozenset[str]
    optional_media: bool = False

    @classmethod
    def of(cls, forward: Callable[..., Any], task: str) -> Reads:
        """What a forward, of a model or of its class, reads for a task."""
        return cls(frozenset(inspect.signature(forward).parameters), task in GENERATES_TEXT)

    @property
    def text(self) -> bool:
        return "input_ids" in self.arguments

    @property
    def images(self) -> bool:
        return "pixel_values" in self.arguments

    @property
    def audio(self) -> bool:
        return any(name in self.arguments for name in AUDIO_INPUTS)

    @property
    def decoder_text(self) -> bool:
        return "decoder_input_ids" in self.arguments


@dataclass(frozen=True)
class Sources:
    """Where calibration inputs come from.

    Attributes:
        documents: texts; None if no text is needed.
        text: name of the text.
        images, audio: files, in the order in which they are used.
        images_folder, audio_folder: the folders they are from.
        samples: largest number of sequences of text.
        length: most tokens in a sequence of text.
        seed: random seed; None to keep the order of the documents.
        batch_size: sequences in a forward; None for the default.
    """

    documents: Sequence[str] | None
    text: str
    images: Sequence[MediaFile] = ()
    audio: Sequence[MediaFile] = ()
    images_folder: Path | None = None
    audio_folder: Path | None = None
    samples: int = 128
    length: int = 128
    seed: int | None = 0
    batch_size: int | None = None


@dataclass(frozen=True)
class InputReport:
    """Facts about calibration inputs that are not the sequences of a causal language model.

    Attributes:
        source: names of the text and the folders, without the folders above them.
        inputs: number of inputs, by kind: "sequences", "images", "audio files".
        arguments: names of the model's arguments that were given.
        tokens: number of text tokens without padding; 0 without text.
        documents: number of documents read; 0 without text.
        asked: number of inputs that were asked for.
    """

    source: str
    inputs: dict[str, int]
    arguments: tuple[str, ...]
    tokens: int = 0
    documents: int = 0
    asked: int = 0
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        found = asdict(self)
        del found["notes"]
        return {**found, "warnings": self.warnings()}

    def lines(self) -> list[str]:
        """One line for the user: what was read."""
        amounts = ", ".join(f"{count:,} {what}" for what, count in self.inputs.items())
        tokens = f", {self.tokens:,} tokens without padding" if self.tokens else ""
        return [f"calibration: {amounts} from {self.source}{tokens}; inputs: {', '.join(self.arguments)}"]

    def warnings(self) -> list[str]:
        """Reasons not to use these inputs; empty if there are none."""
        found = list(self.notes)
        fewest = min(self.inputs.values())
        if fewest < self.asked:
            what = ", ".join(f"{count:,} {kind}" for kind, count in self.inputs.items())
            found.append(f"{self.asked:,} inputs were asked for, but only {what} were found; more give better masks")
        return found


def sources_of(
    reads: Reads,
    what: str,
    read_text: Callable[[], list[str]],
    *,
    text: str,
    images: str | Path | None,
    audio: str | Path | None,
    samples: int,
    length: int,
    seed: int | None,
    batch_size: int | None = None,
) -> Sources:
    """Find the files that a model is calibrated on, and read the text if the model needs one.

    Args:
        reads: what the model reads.
        what: name of the model's class, for messages.
        read_text: reads the documents.
        text: name of the text.
        images, audio: folders, or None.
        samples, length, seed, batch_size: as in :class:`Sources`.

    Raises:
        ArgumentError: if the model does not read what is given, or needs what is not given.
    """
    for option, given, able in (("--images", images, reads.images), ("--audio", audio, reads.audio)):
        if given is not None and not able:
            raise ArgumentError(f"{option}: a {what} does not read that; leave {option} out")
    if images is not None and audio is not None:
        raise ArgumentError("--images and --audio: give one of them")
    if images is None and audio is None and not (reads.text and reads.optional_media):
        for option, able in (("--images DIR", reads.images), ("--audio DIR", reads.audio)):
            if able:
                raise ArgumentError(f"a {what} reads more than text: give {option}")
    if not (reads.text or reads.images or reads.audio):
        raise ArgumentError(
            f"a {what} reads neither text, images nor audio by the usual names: prune it from Python with "
            "ace_triton.prune_model(model, batches)"
        )
    pictures = [] if images is None else image_files(images, samples, seed)
    sounds = [] if audio is None else audio_files(audio, samples, seed)
    media = [*pictures, *sounds]
    wants_text = reads.text or reads.decoder_text
    documents = read_text() if wants_text and (not media or any(file.text is None for file in media)) else None
    return Sources(
        documents,
        text,
        pictures,
        sounds,
        None if images is None else Path(images),
        None if audio is None else Path(audio),
        samples,
        length,
        seed,
        batch_size,
    )


def model_inputs(
    model: Any,
    companions: Companions,
    reads: Reads,
    sources: Sources,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Inputs], InputReport]:
    """Make calibration batches for a model.

    Text alone becomes sequences of at most ``length`` tokens with the tokenizer's special tokens. A decoder beside an
    encoder reads the same text, shifted by its start token. An image or an audio file has the text of the ``.txt`` file
    beside it, or else the beginning of a document.

    Args:
        model: the model, on any device.
        companions: its tokenizer and processors.
        reads: what it reads.
        sources: the text and files.
        progress: called with (done, total), in inputs.

    Returns:
        Batches for :func:`~ace_triton.prune_blocks.prune_model`, and the report.

    Raises:
        ArgumentError: if a file cannot be read, or a processor cannot make inputs from it.
        CheckpointError: if the tokenizer or a processor cannot be loaded.
        TextError: if the text has no tokens.
    """
    maker = _Maker(model, companions, reads, sources)
    media = sources.images or sources.audio
    batches: list[Inputs] = []
    done, total = 0, len(media) or sources.samples
    for count, batch in maker.of_media(media) if media else maker.of_text():
        batches.append(batch)
        done += count
        if progress is not None:
            progress(min(done, total), total)
    if progress is not None and done < total:
        progress(total, total)
    kind = "images" if sources.images else "audio files" if sources.audio else "sequences"
    masked = [batch["attention_mask"] for batch in batches if "attention_mask" in batch and "input_ids" in batch]
    tokens = sum(int(mask.sum()) for mask in masked)
    folder = sources.images_folder or sources.audio_folder
    names = [] if folder is None else [folder.resolve().name]
    if sources.documents is not None:
        names.append(Path(sources.text).name if Path(sources.text).exists() else sources.text)
    return batches, InputReport(
        " and ".join(names),
        {kind: done},
        tuple(batches[0]),
        tokens,
        len(sources.documents or ()),
        sources.samples,
    )


@dataclass(frozen=True)
class _Maker:
    """Makes batches; each comes with its number of inputs."""

    model: Any
    companions: Companions
    reads: Reads
    sources: Sources

    def of_text(self) -> Iterator[tuple[int, Inputs]]:
        sources, tokenizer = self.sources, self.companions.tokenizer
        assert sources.documents is not None
        check_positions(self._positions(), sources.length)
        pieces = pieces_of(sources.documents, tokenizer, sources.samples, sources.length, sources.seed)
        size = sources.batch_size or max(1, TOKENS_OF_A_FORWARD // sources.length)
        for start in range(0, len(pieces), size):
            part = pieces[start : start + size]
            yield len(part), self._known({**padded(part, pad_of(tokenizer)), **self._for_decoder(part)})

    def of_media(self, files: Sequence[MediaFile]) -> Iterator[tuple[int, Inputs]]:
        texts = self._texts(files)
        tools = self._processor(files)
        in_prompt = self.reads.text and _takes_prompts(tools)
        # Prompts with media differ in length, and so does audio; alone none of them is padded.
        usual = 1 if in_prompt or self.sources.audio else IMAGES_OF_A_FORWARD
        size = self.sources.batch_size or usual
        for start in range(0, len(files), size):
            part = slice(start, start + size)
            yield len(files[part]), self._batch(tools, files[part], texts[part], in_prompt=in_prompt)

    def _batch(self, tools: Any, files: Sequence[MediaFile], texts: Sequence[str], *, in_prompt: bool) -> Inputs:
        given: dict[str, Any] = {"return_tensors": "pt"}
        if self.sources.images:
            given["images"] = [read_image(file.path) for file in files]
        else:
            rate = _rate(tools)
            sound = [read_audio(file.path, rate) for file in files]
            given |= {"audio" if in_prompt else "raw_speech": sound, "sampling_rate": rate}
            if len(sound) > 1 and not in_prompt:
                given["padding"] = True
        if self.reads.text:
            given |= {"text": [_prompt(tools, t, self._kind) for t in texts] if in_prompt else list(texts)}
            given["padding"] = True
            if not in_prompt:
                given |= {"truncation": True, "max_length": self._text_length()}
        try:
            made = dict((tools if "raw_speech" not in given else _extractor(tools))(**given))
        except Exception as error:
            raise_if_out_of_memory(error)
            names = ", ".join(file.path.name for file in files[:3])
            raise ArgumentError(
                f"the model's {type(tools).__name__} makes no inputs from {names} ({type(error).__name__}: {error}): "
                "make them in Python, and give them to ace_triton.prune_model"
            ) from error
        if self.reads.decoder_text:
            pieces = [self._ids(text) for text in texts]
            made |= self._for_decoder(pieces)
        return self._known(made)

    @property
    def _kind(self) -> str:
        return "image" if self.sources.images else "audio"

    def _processor(self, files: Sequence[MediaFile]) -> Any:
        if self.reads.text:
            return self.companions.processor
        return self.companions.image_processor if self.sources.images else self.companions.feature_extractor

    def _texts(self, files: Sequence[MediaFile]) -> list[str]:
        """The text of each file: the one beside it, or the beginning of a document."""
        if not (self.reads.text or self.reads.decoder_text):
            return [""] * len(files)
        documents = self.sources.documents or [""]
        found = [file.text or documents[index % len(documents)] for index, file in enumerate(files)]
        return [beginning_of(text, self.companions.tokenizer, self._text_length()) for text in found]

    def _ids(self, text: str) -> list[int]:
        return list(self.companions.tokenizer(text)["input_ids"])[: self._text_length()] or [self._start()]

    def _for_decoder(self, pieces: Sequence[Sequence[int]]) -> Inputs:
        """The decoder's inputs: each piece shifted by the start token, with its mask."""
        if not self.reads.decoder_text:
            return {}
        shifted = [[self._start(), *piece[:-1]] for piece in pieces]
        made = padded(shifted, pad_of(self.companions.tokenizer))
        return {f"decoder_{name}": tensor for name, tensor in made.items()}

    def _start(self) -> int:
        config, generation = self.model.config, getattr(self.model, "generation_config", None)
        tokenizer = self.companions.tokenizer
        stated = [getattr(place, "decoder_start_token_id", None) for place in (config, generation)]
        stated += [tokenizer.bos_token_id, tokenizer.pad_token_id]
        found = next((token for token in stated if isinstance(token, int)), None)
        if found is None:
            raise CheckpointError(
                f"{self.companions.source.name}: its configuration has no decoder_start_token_id, so its decoder "
                "cannot start"
            )
        return found

    def _positions(self) -> int | None:
        return positions_of(self.model.config)

    def _text_length(self) -> int:
        longest = self._positions()
        most = min(self.sources.length, CAPTION_TOKENS)
        return most if longest is None else min(most, longest)

    def _known(self, made: dict[str, Any]) -> Inputs:
        """The tensors that the model's forward takes."""
        return {
            name: value
            for name, value in made.items()
            if name in self.reads.arguments and isinstance(value, torch.Tensor)
        }


def _takes_prompts(processor: Any) -> bool:
    """True if a processor puts the tokens of an image or of audio into a prompt; False for two separate encoders."""
    names = ("image_token", "audio_token", "chat_template", "boi_token")
    return any(getattr(processor, name, None) is not None for name in names)


def _prompt(processor: Any, text: str, kind: str) -> str:
    """A user's message with one image or audio and a text, as the model's chat template writes it."""
    if getattr(processor, "chat_template", None):
        message = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}
        return str(processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    token = getattr(processor, f"{kind}_token", None) or getattr(processor, "boi_token", "")
    return f"{token}\n{text}"


def _extractor(tools: Any) -> Any:
    return getattr(tools, "feature_extractor", tools)


def _rate(tools: Any) -> int:
    return int(getattr(_extractor(tools), "sampling_rate", 16_000))
