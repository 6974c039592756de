"""Adds the pages of the studies, which are drawn from their records and not tracked, to the site."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, *, config: Any) -> Files:
    """Called by mkdocs when it has listed the pages."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from benchmarks.claims.pages import STUDIES, page, read_results

    for folder in STUDIES:
        files.append(File.generated(config, f"{folder.name}.html", content=page(read_results(ROOT / folder))))
    return files
