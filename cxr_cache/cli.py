"""The command line: options to config, one call, one report.

Modules that import torch are imported by the commands that need them, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from click.core import ParameterSource

from cxr_cache import __version__
from cxr_cache.config import (
    BACKENDS,
    CALIBRATIONS,
    DEFAULT_ENCODER,
    FEATURES,
    FINALS,
    INPUT_NORMS,
    LOSSES,
    NORMS,
    PLACES,
    RECIPES,
    SCHEDULES,
    SOURCES,
    SPLITS,
    THRESHOLD_RULES,
    TRAINING_PRECISIONS,
    Augmentation,
    FinetuneConfig,
    Recipe,
    TrainConfig,
)
from cxr_cache.errors import CxrCacheError, StoreFormatError, StoreMismatchError

if TYPE_CHECKING:
    import pandas as pd

    from cxr_cache.cohort import Cohort
    from cxr_cache.encoder import Encoder
    from cxr_cache.run import Run

_AFTER_TRAINING = ("evaluate", "report")
Command: TypeAlias = Callable[..., Any]
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
STORE = click.argument("store", type=FILE)
CSV_DIR = click.option(
    "--csv-dir", type=FOLDER, required=True, help="Folder with the two CSV files."
)


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C: finish what is being written, then leave."""


class ErrorsAsMessages(click.Group):
    """A group that prints errors the user can fix as one message, not a traceback."""

    def invoke(self, ctx: click.Context) -> object:  # noqa: D102
        try:
            return super().invoke(ctx)
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
            ctx.exit(_exit_status(stop))


def _exit_status(stop: KeyboardInterrupt) -> int:
    """128 and the number of the signal."""
    return 143 if isinstance(stop, Terminated) else 130


def _numbers(separator: str) -> Callable[[click.Context, click.Parameter, str], tuple[int, ...]]:
    """A callback that reads whole numbers with `separator` between."""

    def parse(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in value.split(separator))
        except ValueError:
            example = separator.join(("50", "100"))
            raise click.BadParameter(f"{value!r} is not numbers such as {example}.") from None

    return parse


def _part(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    if value is None:
        return None
    number, _, n_parts = value.partition("/")
    if not (number.isdecimal() and n_parts.isdecimal()):
        raise click.BadParameter(f"{value!r} is not a part such as 2/3.")
    return int(number), int(n_parts)


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


@contextmanager
def _progress_bar(total: int | None, unit: str) -> Iterator[Any]:
    """A tqdm bar on stderr, silent when that is not a terminal."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, disable=None, file=sys.stderr, smoothing=0.05) as bar:
        yield bar


def _image_progress(bar: Any) -> Callable[[int, int, int], None]:
    n_failures = 0

    def update(n_done: int, n_failed: int, n_total: int) -> None:
        nonlocal n_failures
        n_failures += n_failed
        bar.total = n_total
        bar.update(n_done + n_failed)
        bar.set_postfix(failed=n_failures, refresh=False)

    return update


def _count_progress(bar: Any) -> Callable[[int, int], None]:
    def update(n_done: int, n_total: int) -> None:
        bar.total = n_total
        bar.update(n_done - bar.n)

    return update


# -- looking ----------------------------------------------------------------------------


@cli.command()
@CSV_DIR
@click.option("--image-dir", type=FOLDER, help="Also look for the image files.")
@click.option("--plot", type=FILE, help="Draw the class distribution into this PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def describe(csv_dir: Path, image_dir: Path | None, plot: Path | None, as_json: bool) -> None:
    """Show findings, counts, views and missing files of a data set."""
    from cxr_cache.cohort import load_cohort
    from cxr_cache.describe import describe_cohort
    from cxr_cache.images import find_missing

    for folder in (image_dir, plot.parent if plot is not None else None):
        if folder is not None:
            _require_folder(folder)
    cohort = load_cohort(csv_dir)
    missing = None if image_dir is None else find_missing(image_dir, cohort.image_ids)
    description = describe_cohort(cohort, missing)
    click.echo(json.dumps(description.to_dict(), indent=2) if as_json else description.to_text())
    if plot is not None:
        from cxr_cache.plots import draw_class_distribution

        counts = description.findings
        draw_class_distribution(
            [c.finding for c in counts],
            [c.images for c in counts],
            [c.studies for c in counts],
            plot,
        )
        click.echo(f"Class distribution drawn to {plot}", err=True)


@cli.command()
@STORE
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def inspect(store: Path, as_json: bool) -> None:
    """Tell all about a feature store on one screen."""
    from cxr_cache.overview import format_store, summarise_store
    from cxr_cache.store import FeatureStore

    with FeatureStore.open(store) as features:
        summary = summarise_store(features)
    click.echo(json.dumps(summary, indent=2) if as_json else format_store(summary))


@cli.command()
@STORE
@click.option("--images", "image_dir", type=FOLDER, help="Encode a sample of these images again.")
@click.option("--sample", default=32, help="With --images: how many.")
@click.option("--seed", default=0, help="With --images: chooses the sample.")
@click.option("--model", help="The store's encoder, where it has moved.  [default: as recorded]")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--repair", is_flag=True, help="Mark bad rows pending, for `extract` to heal.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.pass_context
def verify(
    ctx: click.Context,
    store: Path,
    image_dir: Path | None,
    sample: int,
    seed: int,
    model: str | None,
    device: str,
    repair: bool,
    as_json: bool,
) -> None:
    """Check every row of a store.

    Exit status: 0 whole, 1 incomplete, 3 corrupt, 4 made by another encoder.
    """
    from cxr_cache.verify import verify as run_verification

    try:
        encoder = None if image_dir is None else _load_encoder_of_store(store, model, device)
        with _progress_bar(None, "row") as bar:
            found = run_verification(
                store,
                image_dir=image_dir,
                encoder=encoder,
                n_sampled=sample,
                seed=seed,
                repair=repair,
                on_progress=_count_progress(bar),
            )
    except (StoreFormatError, StoreMismatchError) as error:
        click.echo(f"Error: {error}", err=True)
        ctx.exit(3 if isinstance(error, StoreFormatError) else 4)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.to_text())
    ctx.exit(found.exit_status)


def _load_encoder_of_store(
    store: Path, model: str | None, device: str, remedy: str = "Leave out --images."
) -> Encoder:
    from cxr_cache.encoding import reload_encoder
    from cxr_cache.store import FeatureStore

    with FeatureStore.open(store) as features:
        recorded = features.header.encoder
    if recorded.get("imported"):
        raise StoreMismatchError(
            f"{store} holds embeddings imported from {recorded['name']}; there is no encoder here "
            f"to compare them with. {remedy}"
        )
    return reload_encoder(recorded, model=model, device=device)


@cli.command()
@STORE
@click.option("--run-dir", type=FOLDER, help="A run on this store, whose split is checked.")
@click.option("--image-dir", type=FOLDER, help="Also compare the pictures themselves.")
@click.option("--leakage", is_flag=True, help="Measure what a split by image would have gained.")
@click.option(
    "--repeats", "n_repeats", default=5, help="With --leakage: trainings that are averaged."
)
@click.option(
    "--closeness",
    default=0.1,
    help="Share of the usual distance of embeddings below which two images may be one.",
)
@click.option("--jobs", "n_jobs", default=-1, help="Decoding processes; -1 is one per core.")
@click.option("--out", type=FOLDER, help="Folder for the tables (CSV) and a summary (JSON).")
def audit(
    store: Path,
    run_dir: Path | None,
    image_dir: Path | None,
    leakage: bool,
    n_repeats: int,
    closeness: float,
    n_jobs: int,
    out: Path | None,
) -> None:
    """Look for leaks across the split, duplicates, and images that do not belong."""
    from cxr_cache.audit import AuditConfig, audit_store
    from cxr_cache.run import Run
    from cxr_cache.store import FeatureStore

    if image_dir is not None:
        _require_folder(image_dir)
    config = AuditConfig(closeness=closeness, n_jobs=n_jobs, n_repeats=n_repeats)
    run = None if run_dir is None else Run.open(run_dir)
    with FeatureStore.open(store) as features, _progress_bar(None, "img") as bar:
        found = audit_store(
            features,
            run=run,
            image_dir=image_dir,
            config=config,
            with_leakage=leakage,
            on_progress=_count_progress(bar),
        )
    click.echo(found.to_text())
    if out is not None:
        found.write(out)
        click.echo(f"Tables written to {out}", err=True)


# -- making a store ---------------------------------------------------------------------


@cli.command()
@CSV_DIR
@click.option("--image-dir", type=FOLDER, required=True, help="Folder with the images.")
@click.option("--store", type=FILE, required=True, help="HDF5 file to write or to continue.")
@click.option(
    "--model",
    default=DEFAULT_ENCODER,
    help="hf-hub:ORG/REPO, local-dir:FOLDER, an open_clip name, or random:TIMM_NAME[:SEED].",
)
@click.option("--flip", is_flag=True, help="Also embed each image's mirror image.")
@click.option(
    "--tokens", is_flag=True, help="Also cache what fine-tuning the last blocks starts from."
)
@click.option(
    "--unfreeze-layers",
    type=click.IntRange(min=1),
    help="With --tokens: how many blocks will be fine-tuned.  "
    f"[default: {FinetuneConfig.unfreeze_layers}]",
)
@click.option(
    "--batch-size",
    type=int,
    help="Images per forward pass; fewer where the memory is short.  [default: CPU 8, GPU 256]",
)
@click.option(
    "--num-workers",
    type=int,
    help="Decoding processes; 0 is a thread.  [default: CPU cores / 4; GPU one per core, max 16]",
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    help="auto is bf16 where the processor computes it natively, else fp32.",
)
@click.option(
    "--resize",
    type=click.Choice(["squash", "crop"]),
    help="How a picture becomes square.  [default: as the encoder's configuration says]",
)
@click.option(
    "--normalize",
    type=click.Choice(["encoder", "imagenet"]),
    default="encoder",
    help="Mean and standard deviation of the pixels.",
)
@click.option("--bits-stored", type=int, help="Bits used in 16-bit files.  [default: all 16]")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N images of the table.")
@click.option(
    "--max-failures",
    type=click.IntRange(min=0),
    help="Stop when more images fail.  [default: 1 % of the images, at least 100]",
)
@click.option(
    "--part", callback=_part, metavar="I/N", help="Extract one of N parts, for `merge` to join."
)
@click.option(
    "--recheck-images/--no-recheck-images",
    default=True,
    help="When continuing, look for image files that have changed.",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    help="Share the work out to processes of this machine (loky), a Dask or a Ray cluster.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="With --backend: workers to start, or to wait for.  [default: one per core; a cluster's]",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="With --backend dask or ray: a running cluster.  [default: start one on this machine]",
)
def extract(
    csv_dir: Path,
    image_dir: Path,
    store: Path,
    model: str,
    flip: bool,
    tokens: bool,
    unfreeze_layers: int | None,
    batch_size: int | None,
    num_workers: int | None,
    device: str,
    precision: Any,
    resize: Any,
    normalize: Any,
    bits_stored: int | None,
    limit: int | None,
    max_failures: int | None,
    part: tuple[int, int] | None,
    recheck_images: bool,
    backend: str | None,
    workers: int | None,
    scheduler: str | None,
) -> None:
    """Embed every image once; the same command again continues where it stopped."""
    if backend is None and (workers or scheduler):
        raise click.UsageError("--workers and --scheduler go with --backend.")
    if unfreeze_layers is not None and not tokens:
        raise click.UsageError("--unfreeze-layers goes with --tokens, which caches them.")
    cohort = _load_cohort(csv_dir, limit)
    _require_folder(image_dir)
    from cxr_cache.extract import ExtractConfig, extract_embeddings
    from cxr_cache.extract_workers import EncoderOptions, Workers, extract_on_workers

    config = ExtractConfig(
        batch_size=batch_size,
        num_workers=num_workers,
        flip=flip,
        unfreeze_layers=(unfreeze_layers or FinetuneConfig.unfreeze_layers) if tokens else None,
        max_failures=max_failures,
        part=part,
        recheck_images=recheck_images,
    )
    options = EncoderOptions(model, device, precision, resize, normalize, bits_stored)
    encoder = options.load()
    _warn_if_random(encoder.identity.is_random)
    with _progress_bar(len(cohort), "img") as bar:
        callbacks: Any = {
            "on_progress": _image_progress(bar),
            "on_space": lambda space: bar.write(space.to_text(), file=sys.stderr),
        }
        summary = (
            extract_embeddings(cohort, image_dir, store, encoder, config, **callbacks)
            if backend is None
            else extract_on_workers(
                cohort,
                image_dir,
                store,
                options,
                config,
                Workers(backend, workers, scheduler),
                **callbacks,
            )
        )
    click.echo(summary.to_text())
    if summary.n_failed > config.tolerated_failures(summary.n_images):
        raise click.ClickException(
            f"{summary.n_failed:,} images failed, more than --max-failures tolerates."
        )


@cli.command("import")
@click.argument("embeddings", type=FILE)
@CSV_DIR
@click.option("--store", type=FILE, required=True, help="HDF5 file to write.")
@click.option("--overwrite", is_flag=True, help="Replace a store that is there already.")
def import_(embeddings: Path, csv_dir: Path, store: Path, overwrite: bool) -> None:
    """Make a store from features computed elsewhere (.npz: image_id, embeddings)."""
    from cxr_cache.importing import import_embeddings

    cohort = _load_cohort(csv_dir, None)
    summary = import_embeddings(embeddings, cohort, store, overwrite=overwrite)
    click.echo(summary.to_text())


@cli.command()
@click.argument("parts", type=FILE, nargs=-1, required=True)
@click.option("--store", type=FILE, required=True, help="HDF5 file to write.")
@click.option("--overwrite", is_flag=True, help="Replace a store that is there already.")
def merge(parts: tuple[Path, ...], store: Path, overwrite: bool) -> None:
    """Join the parts that `extract --part` made on several machines."""
    from cxr_cache.merge import merge as run_merge

    click.echo(run_merge(parts, store, overwrite=overwrite).to_text())


def _load_cohort(csv_dir: Path, limit: int | None) -> Cohort:
    from cxr_cache.cohort import load_cohort

    return load_cohort(csv_dir).take(slice(limit))


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise click.ClickException(f"{path} is not a folder.")


def _warn_if_random(is_random: bool) -> None:
    if is_random:
        click.echo(
            "This encoder has RANDOM WEIGHTS: embeddings and results have no medical meaning.",
            err=True,
        )


# -- training ---------------------------------------------------------------------------


def _threshold_rule(default: str | None) -> Callable[[Command], Command]:
    kept = "" if default else "  [default: as stored]"
    return click.option(
        "--threshold-rule",
        default=default,
        metavar="RULE",
        help=f"How thresholds are chosen, out of fold: {', '.join(THRESHOLD_RULES)}.{kept}",
    )


def _calibration(default: str | None) -> Callable[[Command], Command]:
    kept = "" if default else "  [default: as stored]"
    return click.option(
        "--calibration",
        type=click.Choice(CALIBRATIONS),
        default=default,
        help="Map of probabilities, fitted out of fold: one temperature for all findings, or "
        f"Platt's slope and intercept for each.{kept}",
    )


def _resamples(least: int, default: int = 2000) -> Callable[[Command], Command]:
    return click.option(
        "--resamples",
        type=click.IntRange(min=least),
        default=default,
        help="Bootstrap resamples of studies, of patients where they are known.",
    )


def _recipe_options(defaults: type[Recipe]) -> Callable[[Command], Command]:
    """The options that `train` and `finetune` share, with the defaults of their config."""
    options: list[Callable[[Command], Command]] = [
        click.option("--run-dir", type=FOLDER, required=True, help="Folder to write the run to."),
        click.option("--labels", type=FILE, help="CSV whose targets replace the store's."),
        click.option(
            "--epochs",
            default=",".join(map(str, defaults.epochs)),
            callback=_numbers(","),
            help="Candidates of the search.",
        ),
        click.option("--folds", "n_folds", default=defaults.n_folds, help="Folds of the search."),
        click.option("--batch-size", default=defaults.batch_size, help="Images per step."),
        click.option("--weight-decay", default=defaults.weight_decay, help="Of AdamW."),
        click.option(
            "--clip", "max_grad_norm", default=defaults.max_grad_norm, help="Largest gradient norm."
        ),
        click.option(
            "--schedule",
            type=click.Choice(SCHEDULES),
            default=defaults.schedule,
            help="plateau halves the rate when the validation loss stalls for --patience epochs.",
        ),
        click.option("--patience", default=defaults.patience, help="Epochs, for plateau."),
        click.option(
            "--early-stopping", type=int, help="Stop a fold after N epochs without progress."
        ),
        click.option(
            "--loss",
            type=click.Choice(LOSSES),
            default=defaults.loss,
            help="focal weighs every term by alpha, as the reference; focal-balanced is the "
            "paper's.",
        ),
        click.option("--alpha", default=defaults.alpha, help="Alpha of the focal losses."),
        click.option("--gamma", default=defaults.gamma, help="Gamma of the focal losses."),
        click.option(
            "--hidden",
            default="x".join(map(str, defaults.hidden)),
            callback=_numbers("x"),
            help="Widths of the hidden layers.",
        ),
        click.option("--dropout", default=defaults.dropout, help="Of hidden units."),
        click.option(
            "--input-norm",
            type=click.Choice(INPUT_NORMS),
            default=defaults.input_norm,
            help="l2 scales embeddings to length 1.",
        ),
        click.option(
            "--split-by",
            type=click.Choice(SPLITS),
            default=defaults.split_by,
            help="study keeps patients, else studies, whole; image reproduces the reference's "
            "leak.",
        ),
        click.option("--test-fraction", default=defaults.test_fraction, help="Share of test."),
        click.option(
            "--final",
            type=click.Choice(FINALS),
            default=defaults.final,
            help="Final model: trained on all folds, their average, or the best of them "
            "(reference).",
        ),
        click.option("--seed", default=defaults.seed, help="Of split, weights, order and dropout."),
        click.option("--device", default=defaults.device, help="auto, cpu, cuda, cuda:1, mps."),
        _threshold_rule(defaults.threshold_rule),
        _calibration(defaults.calibration),
        click.option(
            "--allow-pending", is_flag=True, help="Train although rows are still pending."
        ),
        click.option("--overwrite", is_flag=True, help="Replace a finished run."),
    ]

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@cli.command()
@STORE
@click.option(
    "--recipe",
    type=click.Choice(tuple(RECIPES)),
    default="tuned",
    help="Defaults of the options below: chosen on real data, or the reference's, which are shown.",
)
@_recipe_options(TrainConfig)
@click.option(
    "--lr", "learning_rate", default=TrainConfig.learning_rate, help="Learning rate of AdamW."
)
@click.option("--norm", type=click.Choice(NORMS), default=TrainConfig.norm, help="Of hidden units.")
@click.option(
    "--features",
    type=click.Choice(FEATURES),
    default=TrainConfig.features,
    help="The embedding, what it is projected from, or both.",
)
@click.option(
    "--flip/--no-flip",
    default=TrainConfig.flip,
    help="Train on the mirror images too, where the store has them.",
)
@click.option(
    "--jobs", "n_jobs", default=TrainConfig.n_jobs, help="Processes on the CPU; -1 is one per core."
)
def train(
    store: Path,
    recipe: str,
    run_dir: Path,
    labels: Path | None,
    allow_pending: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Search the number of epochs by cross-validation, train, and test once."""
    from cxr_cache.fit_on_cores import release_cores
    from cxr_cache.train import train_head

    config = TrainConfig.of_recipe(recipe, **_given(options))
    with _progress_bar(None, "epoch") as bar:
        result = train_head(
            store,
            run_dir,
            config,
            labels=labels,
            allow_pending=allow_pending,
            overwrite=overwrite,
            on_progress=_count_progress(bar),
        )
    release_cores()  # evaluating needs the memory
    _warn_if_random(result.run.config["random_encoder"])
    click.echo(result.to_text())
    _evaluate_and_report(run_dir)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user set, on the command line or by environment variables."""
    source_of = click.get_current_context().get_parameter_source
    return {k: v for k, v in options.items() if source_of(k) != ParameterSource.DEFAULT}


@cli.command()
@STORE
@click.option("--out", type=FOLDER, required=True, help="Folder for the table and what is done.")
@click.option(
    "--set",
    "varied",
    multiple=True,
    metavar="NAME=A,B",
    help="Values to try of an option of `train`, such as lr=1e-4,1e-3 or hidden=512x256,256; "
    "several give all combinations.",
)
@click.option("--sample", "n_sampled", type=click.IntRange(min=1), help="Try N of them at random.")
@click.option(
    "--recipe", type=click.Choice(tuple(RECIPES)), default="tuned", help="What is not varied."
)
@click.option(
    "--epochs",
    default="10,20,30",
    callback=_numbers(","),
    help="Candidates of every setting; the best is taken.",
)
@click.option("--folds", "n_folds", default=TrainConfig.n_folds, help="The same for all settings.")
@click.option("--split-by", type=click.Choice(SPLITS), default=TrainConfig.split_by)
@click.option("--test-fraction", default=TrainConfig.test_fraction, help="Left out altogether.")
@click.option("--seed", default=TrainConfig.seed, help="Of split, weights, order and --sample.")
@click.option("--labels", type=FILE, help="CSV whose targets replace the store's.")
@click.option("--allow-pending", is_flag=True, help="Train although rows are still pending.")
@click.option("--device", default=TrainConfig.device, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--backend", type=click.Choice(BACKENDS), default="loky", help="Where to train.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per core]")
@click.option("--scheduler", help="With --backend dask or ray: a running cluster's address.")
@click.option("--baselines/--no-baselines", default=True, help="Prevalence, logistic, neighbours.")
@click.option("--refit", is_flag=True, help="Train the winner: a run in OUT/best, tested once.")
def ablate(
    store: Path,
    out: Path,
    varied: tuple[str, ...],
    n_sampled: int | None,
    recipe: str,
    labels: Path | None,
    allow_pending: bool,
    backend: str,
    workers: int | None,
    scheduler: str | None,
    baselines: bool,
    refit: bool,
    **options: Any,
) -> None:
    """Compare recipes for the head on the same folds: a ranked table, and a plot."""
    from cxr_cache.ablate import run_ablation
    from cxr_cache.ablation_plot import draw_ablation
    from cxr_cache.baselines import BASELINES
    from cxr_cache.settings import make_settings
    from cxr_cache.train import train_head

    base = TrainConfig.of_recipe(recipe, **options)
    settings = make_settings(base, varied, n_sampled=n_sampled, seed=base.seed)
    with _progress_bar(None, "fold") as bar:
        ablation = run_ablation(
            store,
            out,
            settings,
            labels=labels,
            allow_pending=allow_pending,
            baselines=BASELINES if baselines else (),
            backend=backend,
            n_workers=workers,
            scheduler=scheduler,
            on_progress=_count_progress(bar),
        )
    plot = draw_ablation(ablation.table, out / "ablation.png")
    click.echo(ablation.to_text())
    click.echo(f"Table and plot: {out / 'ablation.csv'}, {plot}")
    if refit:
        result = train_head(
            store,
            out / "best",
            ablation.best.config,
            labels=labels,
            allow_pending=allow_pending,
            overwrite=True,
        )
        click.echo(result.to_text())
        _evaluate_and_report(out / "best")


@cli.command()
@STORE
@_recipe_options(FinetuneConfig)
@click.option(
    "--unfreeze-layers",
    default=FinetuneConfig.unfreeze_layers,
    help="Blocks of the encoder to train, counted from the end.",
)
@click.option(
    "--from-run",
    type=FOLDER,
    help="A run of `train` on this store: takes its split, its number of epochs, its rule of "
    "thresholds and its calibration, and its heads to start from.",
)
@click.option(
    "--source",
    type=click.Choice(SOURCES),
    default=FinetuneConfig.source,
    help="auto is tokens where the store has them, else images.",
)
@click.option("--image-dir", type=FOLDER, help="Folder with the images, to train from images.")
@click.option(
    "--lr",
    "learning_rate",
    default=FinetuneConfig.learning_rate,
    help="Learning rate of the blocks.",
)
@click.option(
    "--head-lr",
    "head_learning_rate",
    default=FinetuneConfig.head_learning_rate,
    help="Learning rate of the head.",
)
@click.option(
    "--warmup-steps",
    default=FinetuneConfig.warmup_steps,
    help="Steps over which the learning rates rise from zero.",
)
@click.option(
    "--decay-norms/--no-decay-norms",
    default=FinetuneConfig.decay_norms,
    help="Whether weight decay applies to norms and biases too.",
)
@click.option(
    "--accumulate", default=FinetuneConfig.accumulate, help="Batches averaged into one step."
)
@click.option(
    "--precision",
    type=click.Choice(TRAINING_PRECISIONS),
    default=FinetuneConfig.precision,
    help="Of the blocks; auto is bf16 where the processor computes it natively, else fp32.",
)
@click.option(
    "--grad-checkpointing",
    is_flag=True,
    help="For small GPUs: compute activations again instead of keeping them.",
)
@click.option(
    "--tokens-in",
    type=click.Choice(PLACES),
    default=FinetuneConfig.tokens_in,
    help="Where cached tokens wait; auto is the fastest place that they fit into.",
)
@click.option("--flip", is_flag=True, help="From images: mirror half of them.")
@click.option(
    "--crop-scale", type=float, help="From images: random crops of at least this share of the area."
)
@click.option(
    "--rotation", "rotation_deg", default=Augmentation.rotation_deg, help="From images: in degrees."
)
@click.option("--brightness", default=Augmentation.brightness, help="From images: 0.2 is ± 20 %.")
@click.option("--contrast", default=Augmentation.contrast, help="From images: 0.2 is ± 20 %.")
@click.option(
    "--num-workers",
    type=int,
    help="From images: decoding processes.  [default: one per core, max 8]",
)
@click.option("--half", is_flag=True, help="Save the trained blocks in float16: half the file.")
@click.option("--model", help="The store's encoder, where it has moved.  [default: as recorded]")
@click.pass_context
def finetune(
    ctx: click.Context,
    /,
    store: Path,
    run_dir: Path,
    labels: Path | None,
    from_run: Path | None,
    image_dir: Path | None,
    model: str | None,
    allow_pending: bool,
    overwrite: bool,
    **recipe: Any,
) -> None:
    """Train the last blocks of the encoder with the head, from tokens or images.

    One number of --epochs is taken without a search. Under torchrun
    (`torchrun --nproc-per-node N -m cxr_cache finetune ...`) N processes share every batch.
    """
    from cxr_cache.finetune import finetune_tail
    from cxr_cache.frozen_start import config_from_run
    from cxr_cache.run import Run

    given = {
        name: value
        for name, value in recipe.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    changes = {field.name for field in fields(Augmentation)}
    pixels = {name: given.pop(name) for name in changes & given.keys()}
    given["augmentation"] = Augmentation(**pixels)
    config = (
        FinetuneConfig(**given)
        if from_run is None
        else config_from_run(Run.open(from_run), **given)
    )
    with _progress_bar(None, "epoch") as bar:
        result = finetune_tail(
            store,
            run_dir,
            config,
            image_dir=image_dir,
            from_run=from_run,
            labels=labels,
            model=model,
            allow_pending=allow_pending,
            overwrite=overwrite,
            echo=lambda line: click.echo(line, err=True),
            on_progress=_count_progress(bar),
        )
    if _is_another_process():  # of several, the first one reports
        return
    _warn_if_random(result.run.config["random_encoder"])
    click.echo(result.to_text())
    _evaluate_and_report(run_dir)
    if from_run is not None:
        from cxr_cache.compare import compare_runs

        click.echo(compare_runs(Run.open(from_run), Run.open(run_dir)).to_text())


def _is_another_process() -> bool:
    """Whether torchrun started this one beside the first."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def _evaluate_and_report(run_dir: Path) -> None:
    from cxr_cache.evaluate import evaluate_run, format_summary
    from cxr_cache.report import write_report
    from cxr_cache.run import Run

    run = Run.open(run_dir)
    try:
        click.echo(format_summary(evaluate_run(run)))
        click.echo(f"Report: {write_report(run)}")
    except KeyboardInterrupt as stop:
        left = "\n".join(shlex.join(["cxr-cache", verb, str(run_dir)]) for verb in _AFTER_TRAINING)
        click.echo(f"\nStopped. {run_dir} is trained; what is left to do:\n{left}", err=True)
        click.get_current_context().exit(_exit_status(stop))


@cli.command()
@click.argument("run", type=FOLDER)
@click.option("--store", type=FILE, help="Score the run on another store (an external test set).")
@click.option("--out", type=FILE, help="With --store: write the metrics to this JSON file.")
@_threshold_rule(None)
@_calibration(None)
@click.option(
    "--groups",
    type=FILE,
    help="CSV with image_id or study_uid and columns such as sex and age: figures for each group.",
)
@_resamples(0)
@click.option("--seed", default=0, help="Seed of the bootstrap.")
@click.option(
    "--model",
    help="With --store, for a fine-tuned run: the encoder, where it has moved.  "
    "[default: as recorded]",
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps.")
def evaluate(
    run: Path,
    store: Path | None,
    out: Path | None,
    threshold_rule: str | None,
    calibration: str | None,
    groups: Path | None,
    resamples: int,
    seed: int,
    model: str | None,
    device: str,
) -> None:
    """Score a run's predictions, with intervals; or the run on another store.

    --threshold-rule and --calibration choose anew, on the run's out-of-fold predictions, and are
    stored with its model.
    """
    from cxr_cache.evaluate import evaluate_predictions, evaluate_run, format_summary
    from cxr_cache.run import Run

    if out is not None and store is None:
        raise click.UsageError("--out goes with --store; a run keeps its own metrics.json.")
    if store is not None and (threshold_rule or calibration):
        raise click.UsageError(
            "--threshold-rule and --calibration are chosen on the run's own out-of-fold "
            "predictions, never on another store. Evaluate the run with them first."
        )
    opened = Run.open(run)
    if store is None:
        metrics = evaluate_run(
            opened,
            threshold_rule=threshold_rule,
            calibration=calibration,
            groups=groups,
            n_resamples=resamples,
            seed=seed,
        )
        click.echo(format_summary(metrics))
        return
    from cxr_cache.predict import predict_store
    from cxr_cache.store import FeatureStore

    with FeatureStore.open(store) as features:
        encoder = None
        if opened.load_model().tail is not None and not features.header.encoder.get("imported"):
            from cxr_cache.encoding import reload_encoder

            encoder = reload_encoder(features.header.encoder, model=model, device=device)
        predictions, targets = predict_store(opened, features, encoder)
    known = predictions["image_id"].isin(opened.read_table("splits")["image_id"])
    if known.any():
        click.echo(
            f"Warning: {known.sum():,} of the {len(known):,} images belong to the run's own data; "
            "figures on images that it was trained on are too good.",
            err=True,
        )
    evaluation = evaluate_predictions(
        predictions,
        targets,
        opened.thresholds,
        calibration=opened.calibration,
        rule=opened.threshold_rule,
        groups=groups,
        n_resamples=resamples,
        seed=seed,
    )
    click.echo(format_summary(evaluation.metrics))
    if out is not None:
        out.write_text(json.dumps(evaluation.metrics, indent=2))


@cli.command()
@click.argument("runs", type=FOLDER, nargs=-1, required=True)
@click.option("--out", type=FOLDER, help="Folder for comparison.csv and comparison.png.")
@_resamples(2)
@click.option("--seed", default=0, help="Seed of the bootstrap.")
def compare(runs: tuple[Path, ...], out: Path | None, resamples: int, seed: int) -> None:
    """How much better RUNS are than the first of them, on the same test studies."""
    from cxr_cache.compare import compare_runs
    from cxr_cache.run import Run

    if len(runs) < 2:
        raise click.UsageError("Give two runs or more; the others are compared with the first.")
    comparison = compare_runs(*map(Run.open, runs), n_resamples=resamples, seed=seed)
    click.echo(comparison.to_text())
    if out is not None:
        from cxr_cache.comparison_plot import write_comparison

        for path in write_comparison(comparison, out):
            click.echo(f"{path} written")


@cli.command("zero-shot")
@STORE
@click.option("--run-dir", type=FOLDER, help="Score this run's test images, beside the run.")
@click.option("--prompts", type=FILE, help="JSON file of prompts.  [default: for the 35 findings]")
@click.option("--out", type=FILE, help="Write the table to this CSV file.")
@_resamples(1, default=1000)
@click.option("--seed", default=0, help="Seed of the bootstrap.")
@click.option("--model", help="The store's encoder, where it has moved.  [default: as recorded]")
def zero_shot(
    store: Path,
    run_dir: Path | None,
    prompts: Path | None,
    out: Path | None,
    resamples: int,
    seed: int,
    model: str | None,
) -> None:
    """What the encoder tells from prompts alone, without training.

    With --run-dir the table is kept in the run's folder, and `report` shows it on the run's page.

    Needs an encoder with a text tower, and pip install 'cxr-cache[text]' for BiomedCLIP's.
    """
    from cxr_cache.prompts import load_prompts
    from cxr_cache.run import Run
    from cxr_cache.store import FeatureStore
    from cxr_cache.text_encoder import load_text_encoder
    from cxr_cache.zero_shot import require_same_encoder, score_zero_shot

    if out is not None:
        _require_folder(out.parent)
    pairs = load_prompts(prompts)
    run = None if run_dir is None else Run.open(run_dir)
    remedy = "Extract the images with a model that has a text tower."
    encoder = _load_encoder_of_store(store, model, "cpu", remedy).identity
    with FeatureStore.open(store) as features:
        require_same_encoder(features, encoder)
        found = score_zero_shot(
            features,
            load_text_encoder(encoder.name),
            pairs,
            run=run,
            n_resamples=resamples,
            seed=seed,
        )
    click.echo(found.to_text())
    if out is not None:
        found.table.to_csv(out, index=False, float_format="%.6g")
    if run is not None and found.is_of_run:
        _keep_zero_shot(run, found.table)


def _keep_zero_shot(run: Run, table: pd.DataFrame) -> None:
    """Put the table into the run's folder, which may be someone else's."""
    try:
        kept = run.write_table("zero_shot", table)
    except PermissionError as error:
        click.echo(f"Not kept with the run: {error.filename} cannot be written.", err=True)
        return
    command = shlex.join(["cxr-cache", "report", str(run.path)])
    click.echo(f"Kept as {kept}; `{command}` puts it on the run's page.")


@cli.command()
@click.argument("runs", type=FOLDER, nargs=-1, required=True)
@click.option(
    "--out",
    type=FILE,
    default="comparison.html",
    help="Page of several runs; that of one is report.html in its folder.",
)
@click.option(
    "--image-dir",
    type=FOLDER,
    help="Folder of the images: the page then shows small pictures of hits, misses and false "
    "alarms, and may not be shared if they may not.",
)
@click.option(
    "--maps",
    is_flag=True,
    help="With --image-dir, for one run: also where it looked in these pictures, which takes a "
    "pass through the encoder for each: up to 12 of each of 40 findings, minutes without a GPU.",
)
@click.option(
    "--model",
    help="With --maps: the run's encoder, where it has moved.  [default: as recorded]",
)
@click.option("--device", default="auto", help="With --maps: auto, cpu, cuda, cuda:1, mps.")
@click.option(
    "--license", "license_id", default="unknown", help="For the model card, as the Hub writes it."
)
@click.option(
    "--dataset", "dataset_id", default="unknown", help="For the model card, as the Hub writes it."
)
@_resamples(2)
def report(
    runs: tuple[Path, ...],
    out: Path,
    image_dir: Path | None,
    maps: bool,
    model: str | None,
    device: str,
    license_id: str,
    dataset_id: str,
    resamples: int,
) -> None:
    """Write the plots, page and model card of a run, or one page for several RUNS.

    Several runs must have been tested on the same studies; differences are to the first.
    """
    from cxr_cache.report import write_joint_report, write_report
    from cxr_cache.run import Run

    if maps and (image_dir is None or len(runs) > 1):
        raise click.UsageError("--maps goes with --image-dir and one run.")
    if not maps and (idle := _given({"model": model, "device": device})):
        raise click.UsageError(f"--{min(idle)} goes with --maps.")
    opened = [Run.open(run) for run in runs]
    options: dict[str, Any] = {"license_id": license_id, "dataset_id": dataset_id}
    if len(opened) > 1:
        page = write_joint_report(opened, out, image_dir=image_dir, n_resamples=resamples)
    elif maps:
        encoder = _load_encoder_of_run(opened[0], model, device)
        with _progress_bar(None, "map") as bar:
            options |= {"encoder": encoder, "on_progress": _count_progress(bar)}
            page = write_report(opened[0], image_dir=image_dir, **options)
    else:
        page = write_report(opened[0], image_dir=image_dir, **options)
    click.echo(f"Report: {page}")


# -- using ------------------------------------------------------------------------------


@cli.command()
@click.argument("run", type=FOLDER)
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=FILE, help="Write a CSV instead of printing the likeliest findings.")
@click.option("--model", help="The run's encoder, where it has moved.  [default: as recorded]")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps.")
def predict(
    run: Path, images: tuple[Path, ...], out: Path | None, model: str | None, device: str
) -> None:
    """Probabilities and decisions for image files (a folder means all its files)."""
    from cxr_cache.run import Run

    paths = _require_files(images)
    if out is not None:
        _require_folder(out.parent)
    opened = Run.open(run)
    encoder = _load_encoder_of_run(opened, model, device)
    from cxr_cache.predict import predict_images

    predictions = predict_images(opened, paths, encoder)
    if out is None:
        click.echo(predictions.to_text())
    else:
        predictions.to_table().to_csv(out, index=False, float_format="%.6g")
        click.echo(f"{len(paths) - predictions.n_failed:,} predictions written to {out}")
    if predictions.n_failed:
        raise click.ClickException(
            f"{predictions.n_failed:,} of {len(paths):,} images could not be used."
        )


@cli.command()
@click.argument("run", type=FOLDER)
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--finding", "findings", multiple=True, required=True, help="May be repeated.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the pictures.")
@click.option(
    "--blocks",
    "n_blocks",
    type=click.IntRange(min=1),
    help="Last blocks to follow back.  [default: those fine-tuned; of a frozen run, the last two]",
)
@click.option(
    "--raw", is_flag=True, help="Also write each map as .npy, rows and columns of patches."
)
@click.option("--model", help="The run's encoder, where it has moved.  [default: as recorded]")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps.")
def explain(
    run: Path,
    images: tuple[Path, ...],
    findings: tuple[str, ...],
    out: Path,
    n_blocks: int | None,
    raw: bool,
    model: str | None,
    device: str,
) -> None:
    """Draw where in image files (a folder means all its files) a finding was seen.

    The maps say what the model's answer rests on, not whether that is right.
    """
    from cxr_cache.explain import explain_images, parse_findings
    from cxr_cache.run import Run

    paths = _require_files(images)
    opened = Run.open(run)
    names = parse_findings(opened, findings)
    encoder = _load_encoder_of_run(opened, model, device)
    from cxr_cache.explain_plot import write_explanations

    maps = explain_images(opened, paths, names, encoder, n_blocks=n_blocks)
    n_written, failures = write_explanations(maps, out, raw=raw)
    click.echo(f"{n_written:,} pictures written to {out}")
    if failures:
        raise click.ClickException(
            f"{len(failures):,} of {len(paths):,} images could not be used:\n" + "\n".join(failures)
        )


@cli.command()
@click.argument("run", type=FOLDER)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["open-clip", "onnx"]),
    required=True,
    help="open-clip: a folder for local-dir:, with the head beside it. onnx: one file, pixels to "
    "probabilities.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder or file to write."
)
@click.option("--model", help="The run's encoder, where it has moved.  [default: as recorded]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
def export(run: Path, file_format: str, out: Path, model: str | None, overwrite: bool) -> None:
    """Write the whole model, encoder included, for use without cxr-cache."""
    from cxr_cache.export import export_run
    from cxr_cache.run import Run

    opened = Run.open(run)
    summary = export_run(opened, out, file_format, model=model, overwrite=overwrite)
    _warn_if_random(opened.config["random_encoder"])
    click.echo(summary.to_text())


def _load_encoder_of_run(run: Run, model: str | None, device: str) -> Encoder:
    from cxr_cache.encoding import reload_encoder
    from cxr_cache.predict import require_encoder_of_run

    recorded = run.load_model().encoder
    require_encoder_of_run(run, recorded, None)
    encoder = reload_encoder(recorded, model=model, device=device)
    _warn_if_random(encoder.identity.is_random)
    return encoder


def _require_files(images: tuple[Path, ...]) -> list[Path]:
    paths = [path for image in images for path in _files_of(image)]
    if not paths:
        raise click.ClickException("There are no files in the folders given.")
    return paths


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file())


@cli.command()
@click.argument("folder", type=FOLDER)
@click.option("--studies", default=450, help="Phantom studies to draw.")
@click.option("--seed", default=0, help="Of phantoms and training.")
def demo(folder: Path, studies: int, seed: int) -> None:
    """The whole job on synthetic chest X-rays: no data, no network, two minutes."""
    from cxr_cache.demo import run_demo

    run_demo(folder, n_studies=studies, seed=seed, echo=click.echo)
