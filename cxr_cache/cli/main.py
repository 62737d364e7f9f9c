"""The command line: its group of commands, errors as messages, and signals.

A command takes options to a config, makes one call and prints one report. Modules that import torch
are imported by the commands that need them, so that ``--help`` is quick.
"""

from __future__ import annotations

import copy
import importlib
import logging
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Final

import click

from cxr_cache import __version__
from cxr_cache.cli.output import is_quiet, set_quiet
from cxr_cache.common.manifest import recording
from cxr_cache.errors import ConfigError, CxrCacheError, JobStopped

_COMMANDS: Final = {
    "store": {
        "describe": "Show what a data set holds, and plan its test.",
        "encoders": "List encoders and their traps; or check the one that NAME stands for.",
        "inspect": "Describe a feature store on one screen: its encoder, its rows, what is cached.",
        "verify": "Check every row of a store.",
        "audit": "Look for leaks across the split, duplicates, and images that do not belong.",
        "browse": "Write a page with a map of a store's embeddings: one point for each image.",
        "similar": "List the images of a store whose embeddings are most like that of IMAGE.",
        "extract": "Embed every image once; the same command again continues where it stopped.",
        "import": "Make a store from an .npz file of features: arrays image_id and embeddings.",
        "merge": "Join the parts that `extract --part` made on several machines.",
        "features": "Write the features of a store, with ids and labels, for other programs.",
    },
    "train": {
        "train": "Search the number of epochs by cross-validation, train, and test once.",
        "ablate": "Compare recipes or encoders on the same folds: a ranked table, and a plot.",
        "finetune": "Train the last blocks of the encoder with the head, from tokens or images.",
    },
    "score": {
        "evaluate": "Score a run's predictions, with intervals; or the run on another store.",
        "compare": "Tell how much better runs are than the first, on the same test studies.",
        "zero-shot": "Score what the encoder answers to text prompts alone, without training.",
        "report": "Write the plots, page and model card of a run, or one page for several RUNS.",
        "checklist": "Fill the checklists CLAIM 2024 and TRIPOD+AI with what a run knows.",
        "methods": "Write the methods section of a paper from what a run recorded.",
    },
    "use": {
        "predict": "Give probabilities and decisions for image files, or folders of them.",
        "explain": "Draw where in image files (a folder means all its files) a finding was seen.",
        "export": "Write a run's model for use without cxr-cache, or for a repository on the Hub.",
        "demo": "Show the whole job on synthetic chest X-rays, without data or a network.",
        "doctor": "Say what works on this machine and in a folder, and what not.",
    },
}
"""Modules beside this one, their commands, and the first line of each command's help, which a test
compares: `cxr-cache --help` imports none of them."""
_THAT_CONTINUE: Final = ("extract", "finetune", "ablate")
"""Commands that, given again after an interruption, go on where they stopped."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C: finish what is being written, then leave."""


def exit_status(stop: KeyboardInterrupt) -> int:
    """128 and the number of the signal."""
    return 143 if isinstance(stop.__cause__ or stop, Terminated) else 130


class Commands(Mapping[str, click.Command]):
    """All commands by name, each imported with its module when it is first asked for."""

    _modules: Final = {name: module for module, names in _COMMANDS.items() for name in names}

    def __init__(self) -> None:
        self._imported: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._imported:
            self._imported[name] = self._import(name)
        return self._imported[name]

    def _import(self, name: str) -> click.Command:
        from cxr_cache.cli.options import config_option, json_option

        module = importlib.import_module(f"cxr_cache.cli.{self._modules[name]}")
        [command] = (
            found
            for found in vars(module).values()
            if isinstance(found, click.Command) and found.name == name
        )
        command.params += [json_option(), config_option(command)]
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of all commands, without importing them."""
        first_lines = {name: line for lines in _COMMANDS.values() for name, line in lines.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(first_lines.items()))

    def _flags(self, ctx: click.Context) -> dict[str, str]:
        """Flags of the command that runs, by the names of their fields."""
        command = self.commands[ctx.invoked_subcommand or ""]
        return {p.name: p.opts[0] for p in command.params if p.name}


@click.group(
    cls=ErrorsAsMessages,
    commands=Commands(),
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
