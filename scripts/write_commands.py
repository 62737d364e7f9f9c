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

_STATUSES: Final = (
    ("0", "done; of `verify`, the store is whole; of `doctor`, the main job can run"),
    (
        "1",
        "an error that the message says how to mend; of `verify`, the store is incomplete; of "
        "`predict` and `explain`, some images could not be used, and the others are written; of "
        "`extract`, more images failed than `--max-failures` tolerates",
    ),
    ("2", "the command line could not be understood"),
    ("3, 4", "of `verify`: the store is corrupt; it was made by another encoder"),
    ("130, 143", "stopped by Ctrl-C; by SIGTERM. The message says what is kept, and how to go on"),
)
_SHARED: Final = """
## What all commands share

The result of a command is on stdout; notes, progress, warnings and errors are on stderr.
`cxr-cache -q COMMAND` writes results, warnings and errors only; `cxr-cache -v COMMAND` tells what
is done, and `-vv` more. With `--json` stdout holds the result as one JSON value and nothing else,
and nothing at all where a command fails before it has a result; `cxr_cache/cli/schemas.json` has a
JSON Schema for each command.

| exit status | meaning |
|---|---|
"""
_ELSEWHERE: Final = """
[install.md](install.md#completion-in-the-shell) has completion in the shell, and
[outputs.md](outputs.md#manifestjson) the manifest that a command leaves beside what it writes.
"""


def render() -> str:
    """The page: a table of all commands, then the help of each."""
    rows, sections = [], []
    for name in cli.list_commands(click.Context(cli)):
        command = cli.commands[name]
        rows.append(f"| [`{name}`](#{name}) | {command.get_short_help_str(limit=200)} |\n")
        sections.append(f"\n## {name}\n\n```\n{_help_of(command, name)}\n```\n")
    statuses = [f"| {status} | {meaning} |\n" for status, meaning in _STATUSES]
    return "".join([_HEAD, *rows, _SHARED, *statuses, _ELSEWHERE, *sections])


def _help_of(command: click.Command, name: str) -> str:
    parent = click.Context(cli, info_name="cxr-cache", **cli.context_settings)
    context = click.Context(command, parent, info_name=name, terminal_width=_WIDTH)
    return command.get_help(context).rstrip()


if __name__ == "__main__":
    OUT.write_text(render(), encoding="utf-8")
    print(f"{OUT.name} written")
