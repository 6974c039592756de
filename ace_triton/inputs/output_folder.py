"""Write a folder atomically: reserve its name at the start, write to a work folder, and rename it at the end.

``OUT`` is reserved by a locked work folder ``.OUT.ace-triton`` beside it, and the new content is written there. If a
run is killed, its work folder stays, and the next run with the same ``OUT`` removes it. A run that can be resumed keeps
its state in the work folder; then only the same run resumes it, and ``restart`` removes it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import CheckpointError
from .model_card import write_card
from .replaceable import foreign_content, why_not_replaced
from .report_file import REPORT_FILE

try:
    import fcntl
except ImportError:  # Windows has no fcntl: there, two runs that write one folder notice each other only at the rename.
    fcntl = None  # type: ignore[assignment]


NEW, OLD, LOCK, KEPT = "new", "old", "lock", "kept"
TOKEN = "token"
"""A file in KEPT. It is empty until the new content is complete. Then it names the folder with the content and the
digest of its report, so a folder that has become OUT is told from one that has not, even if the work folder was copied.
"""
SUFFIX = ".ace-triton"
LONGEST_NAME = 255
ATTEMPTS = 100

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass
class Reservation:
    """A folder that this process may write.

    Attributes:
        path: the folder.
        work: the locked folder beside it.
        written: True once ``path`` holds the new content.
        resumable: True if the work folder stays when the run is interrupted.
    """

    path: Path
    work: Path
    written: bool = False
    resumable: bool = False

    @classmethod
    def of(cls, out: str | Path) -> Reservation:
        """The place of ``out``, for a process whose first process has reserved it."""
        path = _place(out)
        return cls(path, path.with_name(f".{path.name}{SUFFIX}"))

    @property
    def new(self) -> Path:
        """The folder that becomes ``path``."""
        return self.work / NEW

    @property
    def kept(self) -> Path:
        """The folder with the state of a run that can be resumed."""
        return self.work / KEPT

    def keep(self) -> None:
        """Create both folders, or go on with those of an interrupted run."""
        self.new.mkdir(exist_ok=True)
        self.kept.mkdir(exist_ok=True)
        self._write_token("")

    def complete(self, fresh: Path) -> None:
        """Record, for a run that can be resumed, that a folder of the work folder is complete and becomes ``path``."""
        if (self.kept / TOKEN).exists():
            self._write_token(f"{fresh.relative_to(self.work)}\n{_digest_of_report(fresh)}")

    @property
    def is_unfinished(self) -> bool:
        """True if an interrupted run has left its state, and its new content has not become ``path``."""
        try:
            folder, _, digest = (self.kept / TOKEN).read_text().partition("\n")
        except (OSError, ValueError):
            return False
        return self.new.is_dir() and (not folder or _digest_of_report(self.work / folder) == digest)

    def _write_token(self, content: str) -> None:
        """Replace the token in one step, so that it is never half written."""
        partial = self.kept / f"{TOKEN}.partial"
        partial.write_text(content)
        partial.rename(self.kept / TOKEN)


_RESERVED: dict[Path, Reservation] = {}
"""The folders that this process has reserved, so that :func:`replacing` works inside :func:`reserved`."""


def check_out(out: str | Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if ``out`` cannot be written.

    With ``overwrite`` an existing folder may be replaced if it is empty, or if its ``ace_triton.json`` or its
    packed manifest lists every file in it. Links, mount points, the home folder, the working directory and their
    parents are never replaced.
    """
    path = _place(out)
    room = LONGEST_NAME - len(SUFFIX) - 1
    if len(os.fsencode(path.name)) > room:
        raise CheckpointError(f"{out}: the name is too long; at most {room} bytes work")
    if os.path.lexists(path):
        refusal = why_not_replaced(path)
        if not overwrite:
            also = (
                f" (--overwrite would not replace it: it {refusal})"
                if refusal
                else ", or pass --overwrite to replace it"
            )
            raise CheckpointError(f"{out} already exists: name another folder{also}")
        if refusal:
            raise CheckpointError(f"{out} {refusal}")
    parent = next(p for p in path.parents if os.path.lexists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{out}: cannot write to {parent}")


@contextmanager
def reserved(
    out: str | Path, *, overwrite: bool, resumable: bool = False, restart: bool = False
) -> Iterator[Reservation]:
    """Reserve ``out`` for this process. Other ace-triton runs cannot write to it until the block ends.

    Remains of a killed run on the same folder are removed first, with a warning. A KeyboardInterrupt or SystemExit gets
    a note that says whether ``out`` was written.

    Args:
        out: the folder to write.
        overwrite: as in :func:`check_out`.
        resumable: leave the state of an interrupted run (:attr:`Reservation.kept`), and the folder that it was writing.
            Set :attr:`Reservation.resumable` to leave them also if this run is interrupted.
        restart: remove the state of an interrupted run.

    Raises:
        CheckpointError: as in :func:`check_out`, or if another process has reserved ``out``, or if an interrupted run
            left its state and neither ``resumable`` nor ``restart`` is given.
    """
    path = _place(out)
    if path in _RESERVED:
        yield _RESERVED[path]
        return
    check_out(out, overwrite=overwrite)
    place = Reservation.of(out)
    made: list[Path] = []
    try:
        made += [p for p in path.parents if not p.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(place, out)
    except OSError as error:
        _remove_empty(made)
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from error
    try:
        _recover(place, resumable=resumable, restart=restart)
        check_out(out, overwrite=overwrite)
        _RESERVED[path] = place
        yield place
    except (KeyboardInterrupt, SystemExit) as stop:
        unfinished = f"{out} is not finished: the same command resumes it" if place.resumable else None
        stop.add_note(f"{out} was written" if place.written else unfinished or f"nothing was written to {out}")
        raise
    finally:
        _RESERVED.pop(path, None)
        if not place.resumable or place.written:
            for folder in (NEW, KEPT):
                shutil.rmtree(place.work / folder, ignore_errors=True)
        if place.written:
            shutil.rmtree(place.work / OLD, ignore_errors=True)
        with suppress(OSError):
            (place.work / LOCK).unlink()
            place.work.rmdir()
        os.close(lock)
        _remove_empty(made)


@contextmanager
def replacing(out: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a new folder that becomes ``out`` if the block succeeds, and is removed if the block fails.

    An existing ``out`` stays complete until the new folder is complete. On Linux the two are exchanged in one step.
    Files get the mode that the umask gives. Write a report (:func:`write_report`) or a packed manifest last: without
    one of them, a later run refuses to replace the folder.

    Raises:
        CheckpointError: as in :func:`reserved`, or if the content cannot be written.
    """
    with reserved(out, overwrite=overwrite) as place, writing(place, out):
        place.new.mkdir()
        yield place.new
        publish(place, out, overwrite=overwrite)


@contextmanager
def writing(place: Reservation, out: str | Path) -> Iterator[None]:
    """A context in which errors of the disk become one CheckpointError that names ``out``."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # The tokenizers library raises a plain Exception when the disk is full.
        if isinstance(error, OSError | SafetensorError) or type(error) is Exception:
            unchanged = "" if place.written else "; nothing there was changed"
            resume = "; the same command resumes the run" if place.resumable else ""
            raise CheckpointError(f"{out}: could not be written ({error}){unchanged}{resume}") from error
        raise


def publish(place: Reservation, out: str | Path, *, overwrite: bool, fresh: Path | None = None) -> None:
    """Make a folder inside a reservation's work folder ``out``; its files get the mode that the umask gives.

    Args:
        place: the reservation.
        out, overwrite: as for :func:`check_out`.
        fresh: the folder; None for :attr:`Reservation.new`.
    """
    fresh = fresh or place.new
    give_mode(fresh, place.work / LOCK)
    place.complete(fresh)
    _put(place, fresh, out, overwrite=overwrite)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the model card and ``ace_triton.json``, which lists all files so that ``--overwrite`` may delete them."""
    write_card(folder, report)
    files = sorted({*files_in(folder), REPORT_FILE})
    (folder / REPORT_FILE).write_text(json.dumps({**report, "files": files}, indent=2) + "\n")


def files_in(folder: Path) -> list[str]:
    """All files in a folder and its subfolders, as sorted relative POSIX paths."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())


def give_mode(folder: Path, like: Path) -> None:
    """Give all files the mode of ``like``, which follows the umask. (safetensors writes files with mode 0600.)"""
    mode = like.stat().st_mode & 0o777
    for name in files_in(folder):
        path = folder / name
        if not path.is_symlink() and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


def _digest_of_report(folder: Path) -> str:
    """SHA-256 of a folder's report, which has its date; "" if there is none."""
    try:
        return hashlib.sha256((folder / REPORT_FILE).read_bytes()).hexdigest()
    except OSError:
        return ""


def _place(out: str | Path) -> Path:
    """The absolute path of ``out``, with links resolved in its parents and not in itself."""
    path = Path(out).absolute()
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _lock(place: Reservation, out: str | Path) -> int:
    """Create and lock the work folder. Returns the file descriptor of the lock."""
    for _ in range(ATTEMPTS):
        with suppress(FileNotFoundError):  # Another run has just removed its work folder: try again.
            place.work.mkdir(exist_ok=True)
            if place.work.is_symlink() or set(os.listdir(place.work)) - {NEW, OLD, LOCK, KEPT}:
                raise CheckpointError(f"{out}: {place.work} was not made by ace-triton: move it elsewhere")
            lock = os.open(place.work / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            if not _hold(lock):
                os.close(lock)
                raise CheckpointError(
                    f"{out}: another ace-triton is writing to it: wait until it ends, or name another folder"
                )
            if os.path.samestat(os.fstat(lock), os.stat(place.work / LOCK)):
                return lock
            os.close(lock)
    raise CheckpointError(f"{out}: {place.work} cannot be created: another process keeps removing it")


def _hold(lock: int) -> bool:
    """Lock a file until its descriptor is closed. False if another process holds it."""
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # These two mean that the file system has no locks.
            raise
    return True


def _recover(place: Reservation, *, resumable: bool, restart: bool) -> None:
    """Clean up after a run that was killed, or keep what it needs to be resumed."""
    new, old, kept = place.new, place.work / OLD, place.kept
    if place.is_unfinished and not restart:
        place.resumable = True  # Whatever happens from here on, the state stays.
        if not resumable:
            raise CheckpointError(
                f"{place.path}: an interrupted run has left its state: repeat its command to resume it, or add "
                "--restart to it to throw the state away"
            )
        return
    if old.exists() and not os.path.lexists(place.path):
        old.rename(place.path)
        warnings.warn(f"{place.path} was restored: a run was killed while it replaced this folder", stacklevel=4)
    left = [folder for folder in (new, old, kept) if folder.exists()]
    for folder in left:
        shutil.rmtree(folder)
    if left:
        warnings.warn(f"removed {place.work}, left by a killed run that wrote {place.path}", stacklevel=4)


def _put(place: Reservation, fresh: Path, out: str | Path, *, overwrite: bool) -> None:
    """Move the new folder to its place, and delete the old folder if it may be replaced."""
    path, old = place.path, place.work / OLD
    if not os.path.lexists(path):
        fresh.rename(path)  # Fails if a file or a folder with content appeared since the line above.
        place.written = True
        return
    if not overwrite:
        raise CheckpointError(f"{out} was created by another process; nothing there was changed: name another folder")
    refusal = why_not_replaced(path)
    if refusal:
        raise CheckpointError(f"{out} {refusal}; nothing there was changed")
    _flush(fresh)
    if _exchange(fresh, path):
        place.written = True
        refusal = foreign_content(fresh)  # This is the old folder now; no other process knows its path.
        if refusal:
            place.written = not _exchange(fresh, path)
            raise CheckpointError(f"{out} {refusal}; nothing there was changed")
        shutil.rmtree(fresh, ignore_errors=True)
        return
    path.rename(old)
    try:
        refusal = foreign_content(old)
        if refusal:
            raise CheckpointError(f"{out} {refusal}; nothing there was changed")
        fresh.rename(path)
    except BaseException:
        old.rename(path)
        raise
    place.written = True
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Wait until a folder's content is on disk, so that a power failure cannot lose both the old and the new folder."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. Returns False if the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
