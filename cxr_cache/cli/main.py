"""The command line: its group of commands, errors as messages, and signals.

A command takes options to a config, makes one call and prints one report. Modules that import torch
are imported by the commands that need them, so that ``--help`` is quick.
"""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from types import FrameType

import click

from cxr_cache import __version__
from cxr_cache.cli import score, store, train, use
from cxr_cache.cli.options import Terminated, exit_status
from cxr_cache.errors import ConfigError, CxrCacheError

_COMMANDS_IN = (store, train, score, use)


class ErrorsAsMessages(click.Group):
    """A group that prints errors the user can fix as one message, not a traceback."""

    def invoke(self, ctx: click.Context) -> object:  # noqa: D102
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.ClickException(error.spelled(self._flags(ctx))) from error
        except CxrCacheError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.strerror is None:
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{where}{error.strerror}.") from error
        except KeyboardInterrupt as stop:
            given = [word for word in sys.argv[1:] if word != "--overwrite"]  # it starts anew
            command = shlex.join(["cxr-cache", *given])
            what = (
                "What was finished is kept; the same command continues:"
                if ctx.invoked_subcommand in ("extract", "finetune")
                else "The same command starts again:"
            )
            click.echo(f"\nStopped. {what}\n  {command}", err=True)
            ctx.exit(exit_status(stop))

    def _flags(self, ctx: click.Context) -> dict[str, str]:
        """Flags of the command that runs, by the names of their fields."""
        command = self.commands[ctx.invoked_subcommand or ""]
        return {p.name: p.opts[0] for p in command.params if p.name}


@click.group(
    cls=ErrorsAsMessages,
    context_settings={
        "show_default": True,
        "auto_envvar_prefix": "CXR_CACHE",
        "help_option_names": ["-h", "--help"],
    },
)
@click.version_option(__version__, prog_name="cxr-cache")
@click.option("-v", "--verbose", is_flag=True, help="Log what is done in detail, on stderr.")
def cli(verbose: bool) -> None:
    """Cache chest X-ray embeddings once; train, test and predict from the cache.

    Research software. Not for clinical use.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
        stream=sys.stderr,
    )


def main() -> None:
    """Entry point of ``cxr-cache`` and ``python -m cxr_cache``."""
    signal.signal(signal.SIGTERM, _terminate)
    cli()


def _terminate(_signum: int, _frame: FrameType | None) -> None:
    raise Terminated


for _module in _COMMANDS_IN:
    for _command in vars(_module).values():
        if isinstance(_command, click.Command):
            cli.add_command(_command)
