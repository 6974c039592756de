"""Turns the cross references of our docstrings, ``:func:`~package.name` ``, into links where a page has the target."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:py:)?(?:func|class|mod|attr|meth|data|exc):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites every docstring when it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe with every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_link, obj.docstring.value)


def _link(found: re.Match[str]) -> str:
    tilde, target = found.groups()
    shown = target.rpartition(".")[2] if tilde else target
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'
