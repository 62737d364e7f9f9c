"""The command line: its group of commands, errors as messages, and signals.

A command takes options to a config, makes one call and prints one report. Modules that import torch
are imported by the commands that need them, so that ``--help`` is quick.
"""

from __future__ import annotations

import copy
import logging
import shlex
import signal
import sys
from types import FrameType
from typing import Any, Final

import click

from cxr_cache import __version__
from cxr_cache.cli import score, store, train, use
from cxr_cache.cli.options import Terminated, config_option, exit_status, json_option
from cxr_cache.cli.output import is_quiet, set_quiet
from cxr_cache.common.manifest import recording
from cxr_cache.errors import ConfigError, CxrCacheError, JobStopped

_COMMANDS_IN = (store, train, score, use)
_THAT_CONTINUE: Final = ("extract", "finetune", "ablate")
"""Commands that, given again after an interruption, go on where they stopped."""


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
        except JobStopped as stop:
            click.echo(f"\nStopped. {stop}", err=True)
            ctx.exit(exit_status(stop))
        except KeyboardInterrupt as stop:
            given = [word for word in sys.argv[1:] if word != "--overwrite"]  # it starts anew
            command = shlex.join(["cxr-cache", *given])
            what = (
                "What was finished is kept; the same command continues:"
                if ctx.invoked_subcommand in _THAT_CONTINUE
                else "The same command starts again:"
            )
            click.echo(f"\nStopped. {what}\n  {command}", err=True)
            ctx.exit(exit_status(stop))

    def main(self, *given: Any, **options: Any) -> Any:
        """Run a command, and record it beside what it writes."""
        words = given[0] if given else options.get("args")
        with recording(sys.argv[1:] if words is None else list(words)):
            return super().main(*given, **options)

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
@click.option(
    "-v",
    "--verbose",
    count=True,
    help="Tell on stderr what is done; -vv tells more, and what other libraries have to say.",
)
@click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=set_quiet,
    help="Write results, warnings and errors only: no progress and no notes.",
)
def cli(verbose: int) -> None:
    """Cache chest X-ray embeddings once; train, test and predict from the cache.

    Research software. Not for clinical use.

    Every option can also be set by an environment variable, CXR_CACHE_TRAIN_LR for `train --lr`,
    and in a file given with --config. The command line goes first, then the variable, then the
    file.
    """
    if verbose and is_quiet():
        raise click.UsageError("--quiet and --verbose contradict each other; give one of them.")
    start_logging(verbose)


def main() -> None:
    """Entry point of ``cxr-cache`` and ``python -m cxr_cache``."""
    signal.signal(signal.SIGTERM, _terminate)
    cli()


def start_logging(verbosity: int) -> None:
    """Write what the package logs to stderr: warnings, with 1 what is done, with 2 details too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Sentences("%(levelname)s%(message)s"))
    logger = logging.getLogger("" if verbosity > 1 else "cxr_cache")
    for ours in (logging.getLogger(), logging.getLogger("cxr_cache")):
        ours.handlers = [old for old in ours.handlers if not isinstance(old.formatter, _Sentences)]
    logger.addHandler(handler)
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)]
    logging.getLogger("cxr_cache").setLevel(level)
    logging.getLogger().setLevel(logging.INFO if verbosity > 1 else logging.WARNING)


class _Sentences(logging.Formatter):
    """Messages as they are, and the level of those that matter: "Warning: ..."."""

    def format(self, record: logging.LogRecord) -> str:
        shown = copy.copy(record)
        important = record.levelno >= logging.WARNING
        shown.levelname = f"{record.levelname.capitalize()}: " if important else ""
        return super().format(shown)


def _terminate(_signum: int, _frame: FrameType | None) -> None:
    raise Terminated


for _module in _COMMANDS_IN:
    for _command in vars(_module).values():
        if isinstance(_command, click.Command):
            _command.params += [json_option(), config_option(_command)]
            cli.add_command(_command)
