"""Which existing folders an output may replace: only those in which ace-triton wrote every file."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path, PurePosixPath

from .report_file import MANIFEST_FILE, REPORT_FILE, listing, read_json_object


def why_not_replaced(path: Path) -> str | None:
    """Why ``--overwrite`` must not replace ``path``, as the end of a sentence; None if it may."""
    if path.is_symlink():
        return f"is a symbolic link to {os.readlink(path)}: name a folder"
    if path.is_file():
        return "is a file; name a folder"
    if not path.is_dir():
        return "is a device or a pipe; name a folder"
    if os.path.ismount(path):
        return "is a mount point, which cannot be replaced: name a folder inside it"
    with suppress(OSError, RuntimeError):
        for special, kind in ((Path.home(), "the home folder"), (Path.cwd(), "the working directory")):
            if special.resolve().is_relative_to(path):
                return f"is or contains {kind}: name another folder"
    return foreign_content(path)


def foreign_content(folder: Path) -> str | None:
    """Files in a folder that its report and manifest do not list, as the end of a sentence; None if all are listed.

    Version 1 of the packed manifest did not list all files, so it does not count.
    """
    listed: set[str] = set()
    report, manifest = (read_json_object(folder / marker) or {} for marker in (REPORT_FILE, MANIFEST_FILE))
    if isinstance(report.get("files"), list):
        listed |= {REPORT_FILE, *map(str, report["files"])}
    if manifest.get("version") != 1 and isinstance(manifest.get("files"), dict):
        listed |= {MANIFEST_FILE, *manifest["files"]}
    if not listed and (report or manifest):
        return "was written by an older ace-triton, which did not list its files: name another folder, or remove it"
    folders = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    foreign = []
    for root, inner, files in os.walk(folder, onerror=_raise):
        for name in (*inner, *files):
            entry = Path(root, name)
            relative = entry.relative_to(folder).as_posix()
            is_folder = name in inner and not entry.is_symlink()
            if relative not in (folders if is_folder else listed):
                foreign.append(relative)
        inner[:] = [name for name in inner if Path(root, name).relative_to(folder).as_posix() in folders]
    if not foreign:
        return None
    found = listing(sorted(foreign))
    if not listed:
        return f"was not written by ace-triton and contains {found}: name another folder, or remove it yourself"
    return f"also contains {found}, not written by ace-triton: name another folder, or move these files elsewhere"


def _raise(error: OSError) -> None:
    raise error
