"""A file of options, in TOML, YAML or JSON, or the config.json of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

from cxr_cache.common.wording import suggest
from cxr_cache.config import FinetuneConfig, Recipe, TrainConfig
from cxr_cache.errors import ConfigError

_OF_A_RUN: Final = ("format_version", "kind", "store")
"""What tells the config.json of a run from a file that somebody wrote."""
_RECIPES: Final[Mapping[str, type[Recipe]]] = {"train": TrainConfig, "finetune": FinetuneConfig}


def read_config_file(
    path: Path, command: str, known: Mapping[str, str], commands: Collection[str]
) -> dict[str, Any]:
    """Read the options of a command from a file.

    Keys are flags or fields, with dashes or underscores. Those in a section named as the command
    go before those that stand alone; sections of other commands are left aside.

    Parameters
    ----------
    path
        Its ending says what it is: .toml, .yaml, .yml or .json.
    command
        Name of the command.
    known
        Name of each option's parameter, by every spelling of the option.
    commands
        Names of all commands, which may have sections.

    Returns
    -------
    dict[str, Any]
        Values by the names of parameters.

    Raises
    ------
    ConfigError
        The file cannot be read; or it has an option that the command does not have, or one twice.
    """
    values = _parse(path)
    if all(key in values for key in _OF_A_RUN):
        values = _options_of_run(values, path, command)
    names = {_spell(spelling): name for spelling, name in known.items()}
    sections = {_spell(other) for other in commands} - names.keys()
    own: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and _spell(key) in sections:
            own |= value if _spell(key) == _spell(command) else {}
        else:
            plain[key] = value
    return _name(plain, names, path, command) | _name(own, names, path, command)


def _spell(key: str) -> str:
    return key.lstrip("-").replace("-", "_")


def _name(
    values: Mapping[str, Any], names: Mapping[str, str], path: Path, command: str
) -> dict[str, Any]:
    """Put the parameters' names in the place of the keys; a config inside a config is spread."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        if _spell(key) == "augmentation" and isinstance(value, dict):
            named |= _name(value, names, path, command)
            continue
        if _spell(key) not in names:
            hint = suggest(_spell(key), names) or f" `cxr-cache {command} --help` lists them."
            raise ConfigError(f"{path}: {command} has no option {key!r}.{hint}")
        if isinstance(value, dict):
            raise ConfigError(f"{path}: {key} is a table; give it a value.")
        if names[_spell(key)] in named:
            raise ConfigError(f"{path}: {key} is given twice, by its flag and by its field.")
        named[names[_spell(key)]] = value
    return named


def _options_of_run(recorded: Mapping[str, Any], path: Path, command: str) -> dict[str, Any]:
    """What a run was trained with, labels and the run that it started from included."""
    kind = recorded["kind"]
    if kind != command:
        hint = " Start from that run with --from-run." if command == "finetune" else ""
        raise ConfigError(f"{path} is of a run of `cxr-cache {kind}`, not of {command}.{hint}")
    options = {**_RECIPES[kind].earlier, **recorded[kind]}
    for name in ("labels", "from_run"):
        if recorded.get(name):
            options[name] = _find_again(recorded[name]["path"], path)
    return options


def _find_again(recorded: str, config: Path) -> str:
    """A path that was relative where the run was made, which is not always where we are now."""
    starts = (Path(), *config.absolute().parents)
    return str(next((p for start in starts if (p := start / recorded).exists()), recorded))


def _parse(path: Path) -> dict[str, Any]:
    """The file's keys and values; a message names the line that cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = _PARSERS[path.suffix.lower()](text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except KeyError:
        raise ConfigError(
            f"{path}: the ending of a file of options is one of {', '.join(_PARSERS)}."
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}, line {line}: this is not UTF-8. Save the file in that encoding."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if values is None:  # YAML of comments alone
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no options; write them as a table of names and values.")
    return {str(key): value for key, value in values.items()}


def _parse_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    return tomllib.loads(text)  # its errors name line and column


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (at line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem}{where}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


_PARSERS: Final[dict[str, Callable[[str], Any]]] = {
    ".toml": _parse_toml,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
    ".json": json.loads,
}
