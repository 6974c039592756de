"""Fills in what the code itself says: the command line from typer, the methods from their registry.

A page asks for a text with a marker of its own, ``<!-- generated: commands -->``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import typer.main

from ace_triton import metric_names
from ace_triton.commands.cli import app
from ace_triton.methods.registry import metric

MARKER = re.compile(r"<!-- generated: (\w+) -->")
ROLE = re.compile(r":\w+:`~?(?:\w+\.)*(\w+)`")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with every page."""
    return MARKER.sub(lambda found: TEXTS[found[1]](), markdown)


def commands() -> str:
    """Every command of ``ace-triton`` with its arguments and options."""
    group: Any = typer.main.get_command(app)
    return "\n\n".join(_command(name, command) for name, command in group.commands.items())


def _command(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    words = " ".join((argument.metavar or argument.name).upper() for argument in arguments)
    parts = [f"## {name}", f"`{f'ace-triton {name} {words}'.rstrip()}`", inspect.cleandoc(command.help or "")]
    if arguments:
        rows = [[f"`{(a.metavar or a.name).upper()}`", a.help, "required" if a.required else ""] for a in arguments]
        parts.append(_table("argument", rows))
    parts.append(_table("option", [[_spelling(option), option.help, _default(option)] for option in options]))
    return "\n\n".join(parts)


def _spelling(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in sorted(option.opts, key=len))


def _default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    shown = option.default is not None and option.default is not False and not callable(option.default)
    return f"`{getattr(option.default, 'value', option.default)}`" if shown else ""


def _table(what: str, rows: list[list[str | None]]) -> str:
    lines = [f"| {what} | what it does | default |", "|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)])


def _cell(text: str | None) -> str:
    """One line, with nothing that Markdown or HTML would take for its own."""
    plain = " ".join((text or "").split())
    return plain if plain.startswith("`") else plain.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def methods() -> str:
    """Every registered method with its options, their defaults, and its docstring."""
    return "\n\n".join(_method(name) for name in metric_names())


def _method(name: str) -> str:
    chosen = metric(name)
    options = ", ".join(f"`{key}={value!r}`" for key, value in chosen.options.items())
    text = ROLE.sub(r"`\1`", inspect.cleandoc(chosen.terms.__doc__ or ""))
    head, _, rest = text.partition("Args:")
    described = _arguments(inspect.cleandoc("\n" + rest)) if rest else ""
    return "\n\n".join(filter(None, [f"### {name}", head.strip(), described, f"Options: {options or 'none'}."]))


def _arguments(text: str) -> str:
    """The Args section of a docstring as a list, without the weight and the statistics that every method is given."""
    entries = re.findall(r"^(\w+): (.*?)(?=^\w+: |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    kept = [(name, " ".join(words.split())) for name, words in entries if name not in ("weight", "stats")]
    return "\n".join(f"- `{name}`: {words}" for name, words in kept)


TEXTS: dict[str, Callable[[], str]] = {"commands": commands, "methods": methods}
