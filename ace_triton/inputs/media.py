"""Read images and audio from folders, with the texts beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, TextError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
WAVE_SUFFIXES = {".wav"}
AUDIO_SUFFIXES = {*WAVE_SUFFIXES, ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif", ".au"}

MOST_SECONDS = 30.0
"""Longer audio is cut to this length."""


@dataclass(frozen=True)
class MediaFile:
    """An image or an audio file.

    Attributes:
        path: the file.
        text: the text beside it (a ``.txt`` file of the same name): a caption or a transcript; None if there is none.
    """

    path: Path
    text: str | None

    @classmethod
    def of(cls, path: Path) -> MediaFile:
        """A file with the text beside it; TextError if that is not UTF-8."""
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            return cls(path, None)
        try:
            return cls(path, beside.read_text(encoding="utf-8").strip() or None)
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"{beside}: cannot be read as UTF-8 text ({error})") from error


def image_files(folder: str | Path, most: int, seed: int | None) -> list[MediaFile]:
    """Up to ``most`` images in a folder and its subfolders, a random choice if there is a seed.

    Raises:
        ArgumentError: if there are none.
    """
    return _files(folder, IMAGE_SUFFIXES, "--images", "images", most, seed)


def audio_files(folder: str | Path, most: int, seed: int | None) -> list[MediaFile]:
    """Up to ``most`` audio files in a folder and its subfolders, a random choice if there is a seed.

    Raises:
        ArgumentError: if there are none.
    """
    return _files(folder, AUDIO_SUFFIXES, "--audio", "audio files", most, seed)


def _files(
    folder: str | Path, suffixes: set[str], option: str, what: str, most: int, seed: int | None
) -> list[MediaFile]:
    place = Path(folder)
    if not place.is_dir():
        raise ArgumentError(
            f"{option} {folder}: " + ("is a file; name a folder" if place.exists() else "no such folder")
        )
    found = sorted(path for path in place.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        raise ArgumentError(f"{option} {folder}: has no {what} ({', '.join(sorted(suffixes))})")
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(found), generator=generator, device="cpu").tolist()
        found = [found[i] for i in order]
    return [MediaFile.of(path) for path in found[:most]]


def read_image(path: Path) -> Any:
    """An image in RGB, as PIL gives it.

    Raises:
        ArgumentError: if the package pillow is missing, or the file cannot be read.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ArgumentError('reading images needs the package pillow: pip install "ace-triton[images]"') from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ArgumentError(f"{path}: cannot be read as an image ({error}): remove it or save it again") from error


def read_audio(path: Path, rate: int) -> Any:
    """The samples of an audio file, float32 [n_samples], mono, at a sampling rate; at most MOST_SECONDS of it.

    Raises:
        ArgumentError: if a package is missing, or the file cannot be read or is empty.
    """
    import numpy as np

    samples, own_rate = _samples(path)
    if samples.dtype.kind == "u":
        samples = samples.astype(np.float32) / 128 - 1
    elif samples.dtype.kind == "i":
        samples = samples.astype(np.float32) / float(np.iinfo(samples.dtype).max)
    mono = samples.astype(np.float32).reshape(len(samples), -1).mean(1)[: math.ceil(MOST_SECONDS * own_rate)]
    if not len(mono) or not np.isfinite(mono).all():
        raise ArgumentError(f"{path}: has no sound, or samples that are not finite: remove it")
    if own_rate == rate:
        return mono
    common = math.gcd(own_rate, rate)
    return _signal().resample_poly(mono, rate // common, own_rate // common).astype(np.float32)


def _samples(path: Path) -> tuple[Any, int]:
    """Samples [n_samples] or [n_samples, channels] and their rate, by soundfile, or by scipy if that is missing."""
    needs = f'{path}: reading audio needs the package soundfile: pip install "ace-triton[audio]"'
    try:
        import soundfile
    except ImportError as missing:
        if path.suffix.lower() not in WAVE_SUFFIXES:
            raise ArgumentError(needs) from missing
        try:
            from scipy.io import wavfile
        except ImportError:
            raise ArgumentError(needs) from missing
        try:
            rate, samples = wavfile.read(path)
        except (OSError, ValueError) as error:
            raise ArgumentError(f"{path}: cannot be read as audio ({error}): remove it or save it again") from error
        return samples, int(rate)
    try:
        samples, rate = soundfile.read(path, dtype="float32")
    except (OSError, RuntimeError) as error:
        raise ArgumentError(f"{path}: cannot be read as audio ({error}): remove it or save it again") from error
    return samples, int(rate)


def _signal() -> Any:
    try:
        from scipy import signal
    except ImportError as error:
        raise ArgumentError('resampling audio needs the package scipy: pip install "ace-triton[audio]"') from error
    return signal
