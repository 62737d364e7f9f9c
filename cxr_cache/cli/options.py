"""What commands share: options made from the configs, arguments, checks and encoders."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import click
from click.core import ParameterSource

from cxr_cache.cli.config_file import read_config_file
from cxr_cache.cli.output import set_json
from cxr_cache.common.wording import count
from cxr_cache.config import Augmentation, Config, EncoderOptions, Kind, kinds, option_of

if TYPE_CHECKING:
    from cxr_cache.encoders.encoder import Encoder
    from cxr_cache.encoders.identity import EncoderIdentity
    from cxr_cache.models.run import Run

    ParamType: TypeAlias = click.ParamType[Any]
else:
    ParamType = click.ParamType  # which older versions of click cannot index

Command: TypeAlias = Callable[..., Any]
C = TypeVar("C", bound=Config)

FILE: Final = click.Path(dir_okay=False, path_type=Path)
FOLDER: Final = click.Path(file_okay=False, path_type=Path)


# -- options that know their environment variable and their config's field ----------------


class Option(click.Option):
    """An option whose environment variable is spelled as its flag: CXR_CACHE_TRAIN_LR."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:  # noqa: D102
        for flag in self.opts:
            if value := os.environ.get(_variable(ctx, flag)):
                return value
        for flag in self.secondary_opts:  # --no-flip
            if value := os.environ.get(_variable(ctx, flag)):
                return "no" if click.BOOL.convert(value, self, ctx) else "yes"
        return super().resolve_envvar_value(ctx)  # the field's name, as in version 0.1.0

    def process_value(self, ctx: click.Context, value: Any) -> Any:  # noqa: D102
        try:
            return super().process_value(ctx, value)
        except click.BadParameter as error:
            source = ctx.get_parameter_source(self.name or "")
            if source == ParameterSource.DEFAULT_MAP:
                where = str(ctx.meta["config"])
            elif source == ParameterSource.ENVIRONMENT:
                where = f"the environment variable {self._variable_that_is_set(ctx)}"
            else:
                raise
            message = f"{error.message} It stands in {where}."
            raise click.BadParameter(message, ctx, self) from error

    def _variable_that_is_set(self, ctx: click.Context) -> str:
        flags = (*self.opts, *self.secondary_opts, self.name or "")
        return next(name for flag in flags if os.environ.get(name := _variable(ctx, flag)))


def _variable(ctx: click.Context, flag: str) -> str:
    return f"{ctx.auto_envvar_prefix}_{flag.lstrip('-').replace('-', '_').upper()}"


option = partial(click.option, cls=Option)


class _OrNone(ParamType):
    """A value of another type, or the word none."""

    def __init__(self, inner: ParamType) -> None:
        self.inner, self.name = inner, inner.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "none" else self.inner.convert(value, param, ctx)


class _Numbers(ParamType):
    """Whole numbers with a separator between; none are none of them."""

    name = "integers"

    def __init__(self, separator: str) -> None:
        self.separator = separator

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts: Sequence[Any] = value
        if isinstance(value, str):
            parts = () if value == "none" else value.split(self.separator)
        try:
            return tuple(int(part) for part in parts)
        except ValueError:
            example = self.separator.join(("50", "100"))
            self.fail(f"{value!r} is not numbers such as {example}.", param, ctx)


class _Texts(ParamType):
    """Texts with commas between; one that holds a comma itself stands in double quotes."""

    name = "texts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = (
            next(csv.reader([value], skipinitialspace=True)) if isinstance(value, str) else value
        )
        return tuple(part.strip() for part in parts if part.strip())


class Names(ParamType):
    """Text that may be given several times; in an environment variable, with ; between."""

    name = "text"
    envvar_list_splitter = ";"


def options_of(
    config: type[Config],
    *names: str,
    without: Sequence[str] = (),
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[Command], Command]:
    """Make the options of a command from the fields of a config.

    Parameters
    ----------
    config
        Declares them.
    names
        Fields that become options; all, if none are named.
    without
        Fields that do not.
    recipes
        By name, what recipes have instead of the defaults: the help text shows it.
    """

    def add(command: Command) -> Command:
        for of in reversed(fields(config)):  # type: ignore[arg-type]  # subclasses are dataclasses
            if of.name in without or (names and of.name not in names):
                continue
            kind = kinds(config)[of.name]
            if issubclass(kind.type, Config):
                command = options_of(kind.type)(command)
            else:
                command = _option_of(of, kind, recipes or {})(command)
        return command

    return add


def _option_of(
    of: Field[Any], kind: Kind, recipes: Mapping[str, Mapping[str, Any]]
) -> Callable[[Command], Command]:
    """Make the option of one field."""
    known = option_of(of)
    flag = known.flag or f"--{of.name.replace('_', '-')}"

    def show(value: Any) -> str:
        if value == of.default and known.shown:
            return known.shown
        if value is None:
            return "none"
        if isinstance(value, bool):
            return flag.lstrip("-") if value else f"no-{flag.lstrip('-')}"
        if isinstance(value, tuple):
            return known.separator.join(map(str, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    shown = [show(of.default)]
    others = {name: values[of.name] for name, values in recipes.items() if of.name in values}
    shown += [f"{name}: {show(value)}" for name, value in others.items()]

    return option(
        f"{flag}/--no-{flag.lstrip('-')}" if kind.type is bool else flag,
        of.name,
        type=_type_of(kind, known.separator),
        metavar=_metavar(kind, known.separator),
        default=of.default,
        show_default=False,
        help=f"{known.help}  [default: {'; '.join(shown)}]",
    )


def _metavar(kind: Kind, separator: str) -> str | None:
    """How the help text shows the value, where click does not know."""
    if kind.choices:
        return f"[{'|'.join(kind.choices)}]"
    if kind.is_many and kind.type is str:
        return "NAME,NAME"
    return separator.join("IN" if separator == "/" else "NN") if kind.is_many else None


def _type_of(kind: Kind, separator: str) -> ParamType:
    plain = {bool: click.BOOL, int: click.INT, float: click.FLOAT, str: click.STRING}
    inner: ParamType = plain[kind.type]
    if kind.is_many:
        inner = _Texts() if kind.type is str else _Numbers(separator)
    if kind.choices:
        inner = click.Choice(kind.choices)
    may_say_none = kind.is_optional and inner is not click.STRING and "none" not in kind.choices
    return _OrNone(inner) if may_say_none else inner


def options_given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the user set: on the command line, by a variable or in a file."""
    source_of = click.get_current_context().get_parameter_source
    return {k: v for k, v in options.items() if source_of(k) != ParameterSource.DEFAULT}


def pick(config: type[Config], options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a command's options those that are fields of a config, to make it of."""
    names = {of.name for of in fields(config)}  # type: ignore[arg-type]
    picked = {name: value for name, value in options.items() if name in names}
    pixels = pick(Augmentation, options) if "augmentation" in names else {}
    return picked | ({"augmentation": Augmentation(**pixels)} if pixels else {})


# -- options from a file -------------------------------------------------------------------


def config_option(command: click.Command) -> click.Option:
    """Make the option --config of a command, which fills what was not given."""

    def read(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
        if path is not None:
            known = {
                spelling.lstrip("-"): param.name or ""
                for param in command.params
                if isinstance(param, Option)
                for spelling in (*param.opts, param.name or "")
            }
            group = ctx.parent.command if ctx.parent else None
            commands = group.list_commands(ctx) if isinstance(group, click.Group) else ()
            values = read_config_file(path, str(command.name), known, commands)
            ctx.meta["config"] = path
            ctx.default_map = {name: _as_text(command, name, values[name]) for name in values}

    return Option(
        ["--config"],
        type=FILE,
        callback=read,
        is_eager=True,
        expose_value=False,
        help="TOML, YAML or JSON file with the options that are not given here, such as the "
        "config.json of a run.",
    )


def json_option() -> click.Option:
    """Make the option --json, which every command has; see :func:`cxr_cache.cli.output.show`."""
    return Option(
        ["--json"],
        is_flag=True,
        expose_value=False,
        callback=set_json,
        help="Print the result as JSON, and nothing else on stdout; notes go to stderr. A number "
        "that is undefined is null.",
    )


def _as_text(command: click.Command, name: str, value: Any) -> Any:
    """A value of a file as it would be typed, so that it is checked alike."""
    [param] = (param for param in command.params if param.name == name)
    if isinstance(value, list):
        return [str(part) for part in value]
    if value is None:
        return "none" if isinstance(param.type, _OrNone) else None
    if isinstance(param, click.Option) and param.multiple:
        return [str(value)]
    return value if isinstance(value, bool) and param.type == click.BOOL else str(value)


# -- arguments and options of several commands ---------------------------------------------

STORE: Final = click.argument("store", type=FILE)
STORES: Final = click.argument("stores", type=FILE, nargs=-1, required=True)
RUN: Final = click.argument("run", type=FOLDER)
RUNS: Final = click.argument("runs", type=FOLDER, nargs=-1, required=True)
IMAGES: Final = click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
DEVICE: Final = options_of(EncoderOptions, "device")
MODEL_OF_RUN: Final = option(
    "--model", help="Name of the run's encoder, if it has moved.  [default: as recorded]"
)
MODEL_OF_STORE: Final = option(
    "--model", help="Name of the store's encoder, if it has moved.  [default: as recorded]"
)
LABELS: Final = option(
    "--labels",
    type=FILE,
    help="Table of labels to use instead of the store's: a column image_id and one for each "
    "finding (1 present, 0 absent, blank unlabelled). Columns with the patient and a given split "
    "or fold are used too.",
)
GROUPS: Final = option(
    "--groups",
    type=FILE,
    help="CSV file with image_id or study_uid and columns such as sex and age. Figures are "
    "computed for each group, and the table is kept with the run. Sex and age that the data set "
    "itself names need no such file.",
)
ALLOW_PENDING: Final = option(
    "--allow-pending",
    is_flag=True,
    help="Train although some images are still pending, that is, not yet embedded.",
)


def require_folder(path: Path) -> None:
    """Refuse a path that is none, before anything takes long."""
    if not path.is_dir():
        raise click.ClickException(f"{path} is not a folder.")


def warn_if_random(is_random: bool) -> None:
    """Say on stderr that results of such an encoder mean nothing."""
    if is_random:
        click.echo(
            "This encoder has RANDOM WEIGHTS: embeddings and results have no medical meaning.",
            err=True,
        )


def warn_of_encoder(identity: EncoderIdentity) -> None:
    """Say on stderr what to know of features that this encoder makes."""
    warn_if_random(identity.is_random)
    for note in identity.notes:
        click.echo(f"Note: {note}", err=True)


def load_encoder_of_store(
    store: Path, model: str | None, device: str, remedy: str = "Leave out --images."
) -> Encoder:
    """Load what made a store's features; where they were imported, `remedy` ends the message."""
    from cxr_cache.encoders.identity import require_not_imported
    from cxr_cache.encoders.loading import reload_encoder
    from cxr_cache.store.feature_store import FeatureStore

    with FeatureStore.open(store) as features:
        recorded = features.header.encoder
    require_not_imported(
        recorded,
        f"{store} holds",
        f"there is no encoder here to compare them with. {remedy}",
    )
    return reload_encoder(recorded, model=model, device=device)


def load_encoder_of_run(run: Run, model: str | None, device: str) -> Encoder:
    """Load what made the features that a run was trained on; of several, the first."""
    return _load_encoder(run, run.load_model().encoder, model, device)


def load_encoders_of_run(run: Run, models: Sequence[str], device: str) -> list[Encoder]:
    """Load all that made the features that a run was trained on, in the order of its stores."""
    recorded = run.load_model(with_weights=False).encoders
    if models and len(models) != len(recorded):
        names = ", ".join(str(encoder["name"]) for encoder in recorded)
        raise click.UsageError(
            f"--model is given {count(len(models), 'time')}, and {run.path} has "
            f"{count(len(recorded), 'encoder')}: {names}. Give it once for each, in this order."
        )
    return [
        _load_encoder(run, encoder, models[i] if models else None, device)
        for i, encoder in enumerate(recorded)
    ]


def _load_encoder(run: Run, recorded: Mapping[str, Any], model: str | None, device: str) -> Encoder:
    from cxr_cache.encoders.loading import reload_encoder
    from cxr_cache.models.predict import require_encoder_of_run

    require_encoder_of_run(run, recorded, None)
    encoder = reload_encoder(recorded, model=model, device=device)
    warn_if_random(encoder.identity.is_random)
    return encoder
