"""What commands share: arguments and options, progress bars, checks and encoders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import click
from click.core import ParameterSource

from cxr_cache.config import CALIBRATIONS, THRESHOLD_RULES

if TYPE_CHECKING:
    from cxr_cache.encoders.encoder import Encoder
    from cxr_cache.models.run import Run

Command: TypeAlias = Callable[..., Any]

FILE: Final = click.Path(dir_okay=False, path_type=Path)
FOLDER: Final = click.Path(file_okay=False, path_type=Path)
STORE: Final = click.argument("store", type=FILE)
RUN: Final = click.argument("run", type=FOLDER)
RUNS: Final = click.argument("runs", type=FOLDER, nargs=-1, required=True)
IMAGES: Final = click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
DEVICE: Final = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps.")
MODEL_OF_RUN: Final = click.option(
    "--model", help="The run's encoder, where it has moved.  [default: as recorded]"
)
MODEL_OF_STORE: Final = click.option(
    "--model", help="The store's encoder, where it has moved.  [default: as recorded]"
)
SEED: Final = click.option(
    "--seed", type=click.IntRange(min=0), default=0, help="Seed of the bootstrap."
)
GROUPS: Final = click.option(
    "--groups",
    type=FILE,
    help="CSV with image_id or study_uid and columns such as sex and age: figures for each group. "
    "Kept with the run.",
)


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C: finish what is being written, then leave."""


def exit_status(stop: KeyboardInterrupt) -> int:
    """128 and the number of the signal."""
    return 143 if isinstance(stop, Terminated) else 130


def threshold_rule_option(default: str | None) -> Callable[[Command], Command]:
    """How thresholds are chosen; None as the default leaves them as they are."""
    kept = "" if default else "  [default: as stored]"
    return click.option(
        "--threshold-rule",
        default=default,
        metavar="RULE",
        help=f"How thresholds are chosen, out of fold: {', '.join(THRESHOLD_RULES)}.{kept}",
    )


def calibration_option(default: str | None) -> Callable[[Command], Command]:
    """How probabilities are calibrated; None as the default leaves them as they are."""
    kept = "" if default else "  [default: as stored]"
    return click.option(
        "--calibration",
        type=click.Choice(CALIBRATIONS),
        default=default,
        help="Map of probabilities, fitted out of fold: one temperature for all findings, or "
        f"Platt's slope and intercept for each.{kept}",
    )


def options_given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user set, on the command line or by environment variables."""
    source_of = click.get_current_context().get_parameter_source
    return {k: v for k, v in options.items() if source_of(k) != ParameterSource.DEFAULT}


@contextmanager
def progress_bar(total: int | None, unit: str) -> Iterator[Any]:
    """A tqdm bar on stderr, silent when that is not a terminal."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, disable=None, file=sys.stderr, smoothing=0.05) as bar:
        yield bar


@contextmanager
def counting(unit: str) -> Iterator[Callable[[int, int], None]]:
    """The same, as a function to be told how much of how much is done."""
    with progress_bar(None, unit) as bar:

        def update(n_done: int, n_total: int) -> None:
            bar.total = n_total
            bar.update(n_done - bar.n)

        yield update


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
    """Load what made the features that a run was trained on."""
    from cxr_cache.encoders.loading import reload_encoder
    from cxr_cache.models.predict import require_encoder_of_run

    recorded = run.load_model().encoder
    require_encoder_of_run(run, recorded, None)
    encoder = reload_encoder(recorded, model=model, device=device)
    warn_if_random(encoder.identity.is_random)
    return encoder
