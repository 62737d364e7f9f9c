"""Write docs/commands.md from the commands themselves, so that it says what `--help` says.

Run it after a change of any option or help text; tests/test_docs.py fails until it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from cxr_cache.cli.main import cli

OUT: Final = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
_WIDTH: Final = 100

_HEAD: Final = """# Commands

Made by `python scripts/write_commands.py` from the commands' own `--help`.

| command | what it does |
|---|---|
"""


def render() -> str:
    """The page: a table of all commands, then the help of each."""
    rows, sections = [], []
    for name in cli.list_commands(click.Context(cli)):
        command = cli.commands[name]
        rows.append(f"| [`{name}`](#{name}) | {command.get_short_help_str(limit=200)} |\n")
        sections.append(f"\n## {name}\n\n```\n{_help_of(command, name)}\n```\n")
    return _HEAD + "".join(rows) + "".join(sections)


def _help_of(command: click.Command, name: str) -> str:
    parent = click.Context(cli, info_name="cxr-cache", **cli.context_settings)
    context = click.Context(command, parent, info_name=name, terminal_width=_WIDTH)
    return command.get_help(context).rstrip()


if __name__ == "__main__":
    OUT.write_text(render(), encoding="utf-8")
    print(f"{OUT.name} written")
