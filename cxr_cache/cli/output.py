"""What commands write: results on stdout, as text or as JSON, and everything else on stderr."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import click

_JSON: Final = "cxr-cache: json"
_QUIET: Final = "cxr-cache: quiet"


def show(text: str | Callable[[], str], data: Any) -> None:
    """Write the result of a command, as text or, with --json, as JSON.

    `text` may be a function where it takes long to make.
    """
    if is_json():
        give(data)
    else:
        say(text if isinstance(text, str) else text())


def say(text: str) -> None:
    """Write a part of the result in words, as soon as it is known; nothing with --json."""
    if not is_json():
        click.echo(text)


def give(data: Any) -> None:
    """Write the whole result as JSON if --json was given: once, when the command has done all.

    `data` is what :func:`cxr_cache.common.plain.to_plain` takes. It has a schema in
    cxr_cache/cli/schemas.json, which tests hold it against.
    """
    if is_json():
        from cxr_cache.common.plain import to_json

        click.echo(to_json(data))


def note(text: str) -> None:
    """Write on stderr what one may like to know beside the result; nothing with --quiet."""
    if not is_quiet():
        click.echo(text, err=True)


def is_json() -> bool:
    """Whether stdout is to hold nothing but JSON."""
    return bool(_meta().get(_JSON))


def is_quiet() -> bool:
    """Whether nothing but results, warnings and errors is to be written."""
    return bool(_meta().get(_QUIET))


def set_json(ctx: click.Context, _param: click.Parameter, is_set: bool) -> None:
    """Take --json of a command, wherever it was set."""
    ctx.meta[_JSON] = is_set


def set_quiet(ctx: click.Context, _param: click.Parameter, is_set: bool) -> None:
    """Take --quiet of the whole command line."""
    ctx.meta[_QUIET] = is_set


def _meta() -> dict[str, Any]:
    context = click.get_current_context(silent=True)
    return {} if context is None else context.meta
