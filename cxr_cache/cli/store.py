"""Commands that make a feature store, look at it and check it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cxr_cache.cli.options import (
    DEVICE,
    FILE,
    FOLDER,
    MODEL_OF_STORE,
    STORE,
    counting,
    load_encoder_of_store,
    progress_bar,
    require_folder,
    warn_if_random,
)
from cxr_cache.config import BACKENDS, DEFAULT_ENCODER, FinetuneConfig
from cxr_cache.errors import StoreFormatError, StoreMismatchError

if TYPE_CHECKING:
    from cxr_cache.datasets.cohort import Cohort

_CSV_DIR: Final = click.option(
    "--csv-dir", type=FOLDER, required=True, help="Folder with the two CSV files."
)


@click.command()
@_CSV_DIR
@click.option("--image-dir", type=FOLDER, help="Also look for the image files.")
@click.option("--plot", type=FILE, help="Draw the class distribution into this PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def describe(csv_dir: Path, image_dir: Path | None, plot: Path | None, as_json: bool) -> None:
    """Show findings, counts, views and missing files of a data set."""
    from cxr_cache.datasets.describe import describe_cohort
    from cxr_cache.datasets.images import find_missing
    from cxr_cache.datasets.readers import load_cohort

    for folder in (image_dir, plot.parent if plot is not None else None):
        if folder is not None:
            require_folder(folder)
    cohort = load_cohort(csv_dir)
    missing = None if image_dir is None else find_missing(image_dir, cohort.image_ids)
    description = describe_cohort(cohort, missing)
    click.echo(json.dumps(description.to_dict(), indent=2) if as_json else description.to_text())
    if plot is not None:
        from cxr_cache.report.plots import draw_class_distribution

        counts = description.findings
        draw_class_distribution(
            [c.finding for c in counts],
            [c.images for c in counts],
            [c.studies for c in counts],
            plot,
        )
        click.echo(f"Class distribution drawn to {plot}", err=True)


@click.command()
@STORE
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def inspect(store: Path, as_json: bool) -> None:
    """Tell all about a feature store on one screen."""
    from cxr_cache.store.feature_store import FeatureStore
    from cxr_cache.store.inspect import format_store, summarise_store

    with FeatureStore.open(store) as features:
        summary = summarise_store(features)
    click.echo(json.dumps(summary, indent=2) if as_json else format_store(summary))


@click.command()
@STORE
@click.option("--images", "image_dir", type=FOLDER, help="Encode a sample of these images again.")
@click.option("--sample", default=32, help="With --images: how many.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, help="With --images: chooses the sample."
)
@MODEL_OF_STORE
@DEVICE
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
    from cxr_cache.store.verify import verify as run_verification

    try:
        encoder = None if image_dir is None else load_encoder_of_store(store, model, device)
        with counting("row") as on_progress:
            found = run_verification(
                store,
                image_dir=image_dir,
                encoder=encoder,
                n_sampled=sample,
                seed=seed,
                repair=repair,
                on_progress=on_progress,
            )
    except (StoreFormatError, StoreMismatchError) as error:
        click.echo(f"Error: {error}", err=True)
        ctx.exit(3 if isinstance(error, StoreFormatError) else 4)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.to_text())
    ctx.exit(found.exit_status)


@click.command()
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
    from cxr_cache.evaluation.audit import AuditConfig, audit_store
    from cxr_cache.models.run import Run
    from cxr_cache.store.feature_store import FeatureStore

    if image_dir is not None:
        require_folder(image_dir)
    config = AuditConfig(closeness=closeness, n_jobs=n_jobs, n_repeats=n_repeats)
    run = None if run_dir is None else Run.open(run_dir)
    with FeatureStore.open(store) as features, counting("img") as on_progress:
        found = audit_store(
            features,
            run=run,
            image_dir=image_dir,
            config=config,
            with_leakage=leakage,
            on_progress=on_progress,
        )
    click.echo(found.to_text())
    if out is not None:
        found.write(out)
        click.echo(f"Tables written to {out}", err=True)


def _part(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    if value is None:
        return None
    number, _, n_parts = value.partition("/")
    if not (number.isdecimal() and n_parts.isdecimal()):
        raise click.BadParameter(f"{value!r} is not a part such as 2/3.")
    return int(number), int(n_parts)


@click.command()
@_CSV_DIR
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
@DEVICE
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
    require_folder(image_dir)
    from cxr_cache.store.extract import ExtractConfig, extract_embeddings
    from cxr_cache.store.workers import EncoderOptions, Workers, extract_on_workers

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
    warn_if_random(encoder.identity.is_random)
    with progress_bar(len(cohort), "img") as bar:
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


@click.command("import")
@click.argument("embeddings", type=FILE)
@_CSV_DIR
@click.option("--store", type=FILE, required=True, help="HDF5 file to write.")
@click.option("--overwrite", is_flag=True, help="Replace a store that is there already.")
def import_(embeddings: Path, csv_dir: Path, store: Path, overwrite: bool) -> None:
    """Make a store from features computed elsewhere (.npz: image_id, embeddings)."""
    from cxr_cache.store.importing import import_embeddings

    cohort = _load_cohort(csv_dir, None)
    summary = import_embeddings(embeddings, cohort, store, overwrite=overwrite)
    click.echo(summary.to_text())


@click.command()
@click.argument("parts", type=FILE, nargs=-1, required=True)
@click.option("--store", type=FILE, required=True, help="HDF5 file to write.")
@click.option("--overwrite", is_flag=True, help="Replace a store that is there already.")
def merge(parts: tuple[Path, ...], store: Path, overwrite: bool) -> None:
    """Join the parts that `extract --part` made on several machines."""
    from cxr_cache.store.merge import merge as run_merge

    click.echo(run_merge(parts, store, overwrite=overwrite).to_text())


def _image_progress(bar: Any) -> Callable[[int, int, int], None]:
    n_failures = 0

    def update(n_done: int, n_failed: int, n_total: int) -> None:
        nonlocal n_failures
        n_failures += n_failed
        bar.total = n_total
        bar.update(n_done + n_failed)
        bar.set_postfix(failed=n_failures, refresh=False)

    return update


def _load_cohort(csv_dir: Path, limit: int | None) -> Cohort:
    from cxr_cache.datasets.readers import load_cohort

    return load_cohort(csv_dir).take(slice(limit))
