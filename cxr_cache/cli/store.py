"""Commands that make a feature store, look at it and check it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cxr_cache.cli.options import (
    DEVICE,
    FILE,
    FOLDER,
    MODEL_OF_STORE,
    STORE,
    load_encoder_of_store,
    option,
    options_given,
    options_of,
    pick,
    require_folder,
    warn_of_encoder,
)
from cxr_cache.cli.output import give, note, say, show
from cxr_cache.cli.progress import Progress, counting, progress
from cxr_cache.config import (
    FEATURES,
    AuditConfig,
    BrowseConfig,
    EncoderOptions,
    ExtractConfig,
    Features,
    FinetuneConfig,
    PlanConfig,
    ReadConfig,
    SimilarConfig,
    TrainConfig,
    VerifyConfig,
    WorkersConfig,
)
from cxr_cache.errors import StoreFormatError, StoreMismatchError

if TYPE_CHECKING:
    from cxr_cache.datasets.cohort import Cohort

_DATA: Final = option(
    "--data",
    "--csv-dir",
    "data",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of a data set, table, or folder of images. --csv-dir is the older spelling.",
)
_FORMAT: Final = option(
    "--format",
    "data_format",
    default="auto",
    help="Form of the data set, such as indiana or table. auto recognises it by files and columns.",
)

logger = logging.getLogger(__name__)


@click.command()
@_DATA
@_FORMAT
@option("--image-dir", type=FOLDER, help="Folder with the images, to count those missing.")
@options_of(ReadConfig)
@option("--plot", type=FILE, help="PNG file to draw the class distribution into.")
@option(
    "--plan",
    is_flag=True,
    help="Also say how wide the intervals of a test are expected to be before it is trained for.",
)
@options_of(PlanConfig)
def describe(
    data: Path,
    data_format: str,
    image_dir: Path | None,
    plot: Path | None,
    plan: bool,
    **options: Any,
) -> None:
    """Show what a data set holds, and plan its test."""
    from cxr_cache.datasets.describe import describe_cohort, plan_test
    from cxr_cache.datasets.images import find_missing
    from cxr_cache.datasets.readers import load_cohort

    for folder in (image_dir, plot.parent if plot is not None else None):
        if folder is not None:
            require_folder(folder)
    if not plan and (idle := options_given(pick(PlanConfig, options))):
        raise click.UsageError(f"--{min(idle).replace('_', '-')} goes with --plan.")
    planned = PlanConfig(**pick(PlanConfig, options))
    config = ReadConfig(**pick(ReadConfig, options))
    cohort = load_cohort(data, data_format, image_dir=image_dir, config=config)
    missing = None if image_dir is None else find_missing(image_dir, cohort.image_ids)
    description = describe_cohort(cohort, missing)
    expected = plan_test(cohort, planned) if plan else None
    more = {} if expected is None else {"plan": expected.to_dict()}
    planned_text = "" if expected is None else f"\n\n{expected.to_text()}"
    show(lambda: description.to_text() + planned_text, description.to_dict() | more)
    if plot is not None:
        from cxr_cache.report.plots import draw_class_distribution

        counts = description.findings
        draw_class_distribution(
            [c.finding for c in counts],
            [c.images for c in counts],
            [c.studies for c in counts],
            plot,
        )
        note(f"Class distribution drawn to {plot}")


@click.command()
@click.argument("name", required=False)
@options_of(EncoderOptions, without=("name", "device", "precision", "bits_stored"))
def encoders(name: str | None, **options: Any) -> None:
    """List encoders and their traps; or check the one that NAME stands for.

    NAME is what --model takes, or a folder or file with weights. It is loaded, and encodes one
    black image; nothing is written.
    """
    from cxr_cache.encoders.catalogue import check, known

    if name is None:
        if given := options_given(options):
            raise click.UsageError(f"--{min(given)} goes with NAME.")
        every = [check.describe_known(each) for each in known.read_known().values()]
        show(check.format_known, every)
        return
    path = Path(name if Path(name).exists() else name.rpartition("?")[0])
    if name and path != Path() and path.exists():
        name = f"local-{'dir' if path.is_dir() else 'file'}:{name}"
    if about := known.find_known(name):
        say(f"{check.format_one(about)}\n")  # also where its weights are not there
    found = check.check_encoder(name, precision="fp32", **options)
    show(lambda: check.format_check(found), found)


@click.command()
@STORE
def inspect(store: Path) -> None:
    """Describe a feature store on one screen: its encoder, its rows, what is cached."""
    from cxr_cache.store.feature_store import FeatureStore
    from cxr_cache.store.inspect import format_store, summarise_store

    with FeatureStore.open(store) as features:
        summary = summarise_store(features)
    show(lambda: format_store(summary), summary)


@click.command()
@STORE
@option("--images", "image_dir", type=FOLDER, help="Folder with images to encode again.")
@options_of(VerifyConfig)
@MODEL_OF_STORE
@DEVICE
@option("--repair", is_flag=True, help="Mark bad rows as pending, for extract to compute.")
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    store: Path,
    image_dir: Path | None,
    model: str | None,
    device: str,
    repair: bool,
    **options: Any,
) -> None:
    """Check every row of a store.

    Exit status: 0 whole, 1 incomplete, 3 corrupt, 4 made by another encoder.
    """
    from cxr_cache.store.verify import verify as run_verification

    config = VerifyConfig(**options)
    try:
        encoder = None if image_dir is None else load_encoder_of_store(store, model, device)
        with counting("rows") as on_progress:
            found = run_verification(
                store,
                image_dir=image_dir,
                encoder=encoder,
                **vars(config),
                repair=repair,
                on_progress=on_progress,
            )
    except (StoreFormatError, StoreMismatchError) as error:
        click.echo(f"Error: {error}", err=True)
        ctx.exit(3 if isinstance(error, StoreFormatError) else 4)
    show(found.to_text, found.to_dict())
    ctx.exit(found.exit_status)


@click.command()
@STORE
@option("--run-dir", type=FOLDER, help="Run on this store whose split is checked.")
@option("--image-dir", type=FOLDER, help="Folder with the images, to compare them too.")
@option("--leakage", is_flag=True, help="Measure what a split by image would have gained.")
@options_of(AuditConfig)
@option("--out", type=FOLDER, help="Folder for the tables (CSV) and a summary (JSON).")
def audit(
    store: Path,
    run_dir: Path | None,
    image_dir: Path | None,
    leakage: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Look for leaks across the split, duplicates, and images that do not belong."""
    from cxr_cache.evaluation.audit import audit_store
    from cxr_cache.models.run import Run
    from cxr_cache.store.feature_store import FeatureStore

    if image_dir is not None:
        require_folder(image_dir)
    config = AuditConfig(**options)
    run = None if run_dir is None else Run.open(run_dir)
    with FeatureStore.open(store) as features, counting("images") as on_progress:
        found = audit_store(
            features,
            run=run,
            image_dir=image_dir,
            config=config,
            with_leakage=leakage,
            on_progress=on_progress,
        )
    say(found.to_text())
    if out is not None:
        found.write(out)
        note(f"Tables written to {out}")
    give(found.to_dict())


@click.command()
@STORE
@option(
    "--out",
    type=FILE,
    help="HTML file that is written.  [default: the store's name with .html, beside it]",
)
@option("--run-dir", type=FOLDER, help="Run on this store whose split and labels are shown.")
@option(
    "--image-dir",
    type=FOLDER,
    help="Folder with the images: small pictures of up to 1,000 of them go into the page, which "
    "may then not be shared if the images may not.",
)
@options_of(BrowseConfig)
def browse(
    store: Path, out: Path | None, run_dir: Path | None, image_dir: Path | None, **options: Any
) -> None:
    """Write a page with a map of a store's embeddings: one point for each image.

    It is coloured by finding, projection, split, and distance from the other images, and lists what
    failed. Of more than 20,000 images it shows a random sample.
    """
    from cxr_cache.jobs.browse import write_map
    from cxr_cache.models.run import Run
    from cxr_cache.store.feature_store import FeatureStore

    if image_dir is not None:
        require_folder(image_dir)
    run = None if run_dir is None else Run.open(run_dir)
    with FeatureStore.open(store) as features:
        page = write_map(
            features,
            out or store.with_suffix(".html"),
            run=run,
            image_dir=image_dir,
            config=BrowseConfig(**options),
        )
    show(page.to_text, page.to_dict())


@click.command()
@STORE
@click.argument("image")
@options_of(SimilarConfig)
@MODEL_OF_STORE
@DEVICE
def similar(store: Path, image: str, model: str | None, device: str, **options: Any) -> None:
    """List the images of a store whose embeddings are most like that of IMAGE.

    They are compared by their cosine. IMAGE is the id of an image in the store, or else an image
    file, which the store's own encoder encodes.
    """
    from cxr_cache.jobs.similar import encode_file, find_similar, is_file_of
    from cxr_cache.store.feature_store import FeatureStore

    config = SimilarConfig(**options)
    with FeatureStore.open(store) as features:
        query: Any = image
        if is_file_of(features, image, config):
            encoder = load_encoder_of_store(
                store, model, device, "Give the id of an image in the store."
            )
            query = encode_file(features, image, encoder)
        elif given := options_given({"model": model, "device": device}):
            raise click.UsageError(f"--{min(given)} goes with an image file; {image} is an id.")
        found = find_similar(features, query, config)
    show(found.to_text, found.to_dict())


@click.command()
@_DATA
@_FORMAT
@option(
    "--image-dir",
    type=FOLDER,
    help="Folder with the images.  [default: the folder images beside the tables, else theirs]",
)
@options_of(ReadConfig)
@option("--store", type=FILE, required=True, help="HDF5 file that is written, or continued.")
@options_of(EncoderOptions)
@option(
    "--tokens",
    is_flag=True,
    help="Also cache tokens, which are what the last blocks take in: finetune starts from them.",
)
@options_of(ExtractConfig)
@option(
    "--limit",
    type=click.IntRange(min=1),
    help="Number of images to extract, from the top of the table.  [default: all]",
)
@options_of(WorkersConfig)
def extract(
    data: Path,
    data_format: str,
    image_dir: Path | None,
    store: Path,
    tokens: bool,
    limit: int | None,
    **given: Any,
) -> None:
    """Embed every image once; the same command again continues where it stopped."""
    workers = WorkersConfig(**pick(WorkersConfig, given))
    config = ExtractConfig(**pick(ExtractConfig, given))
    options = _encoder_options(store, pick(EncoderOptions, given))
    if workers.backend is None and workers != WorkersConfig():
        raise click.UsageError("--workers and --scheduler go with --backend.")
    for name in ("unfreeze_layers", "tokens_dtype"):
        if name in options_given(given) and not tokens:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag} goes with --tokens, which caches them.")
    if tokens and config.unfreeze_layers is None:
        config = replace(config, unfreeze_layers=FinetuneConfig.unfreeze_layers)
    from cxr_cache.datasets.locate import default_image_dir

    if image_dir is None:
        image_dir = default_image_dir(data)
    cohort = _load_cohort(data, data_format, image_dir, pick(ReadConfig, given)).take(slice(limit))
    require_folder(image_dir)
    from cxr_cache.encoders.catalogue.known import find_known
    from cxr_cache.store.extract import extract_embeddings
    from cxr_cache.store.workers import Workers, extract_on_workers, load_once

    encoder = load_once(options)
    identity = encoder.identity
    warn_of_encoder(identity)
    note(f"encoder: {identity.to_text()}")
    logger.info("it computes on %s in %s", encoder.device, identity.precision)
    known = find_known(identity.name)
    if known is not None and cohort.reading is not None and cohort.reading.format in known.seen:
        logger.warning(
            f"{known.name} was trained on images of the data set that {cohort.reading.format} "
            "reads, so a test on them may flatter it."
        )
    with progress("images") as shown:
        callbacks: Any = {
            "on_progress": _image_progress(shown),
            "on_space": lambda space: note(space.to_text()),
        }
        summary = (
            extract_embeddings(cohort, image_dir, store, encoder, config, **callbacks)
            if workers.backend is None
            else extract_on_workers(
                cohort,
                image_dir,
                store,
                options,
                config,
                Workers(**vars(workers)),
                **callbacks,
            )
        )
    show(summary.to_text, vars(summary))
    if failure := summary.failure(config):
        raise click.ClickException(failure)


def _encoder_options(store: Path, options: dict[str, Any]) -> EncoderOptions:
    """Of a store that is there, the encoder that made it, where no other was asked for."""
    from cxr_cache.encoders.loading import recorded_options
    from cxr_cache.store.feature_store import FeatureStore

    if not store.is_file():
        return EncoderOptions(**options)
    with FeatureStore.open(store) as features:
        recorded = features.header.encoder
    if recorded.get("imported"):
        return EncoderOptions(**options)
    return replace(recorded_options(recorded), **options_given(options))


@click.command("import")
@click.argument("embeddings", type=FILE)
@_DATA
@_FORMAT
@options_of(ReadConfig)
@option("--store", type=FILE, required=True, help="HDF5 file that is written.")
@option("--overwrite", is_flag=True, help="Replace a store that is already there.")
def import_(
    embeddings: Path, data: Path, data_format: str, store: Path, overwrite: bool, **reading: Any
) -> None:
    """Make a store from an .npz file of features: arrays image_id and embeddings."""
    from cxr_cache.store.importing import import_embeddings

    cohort = _load_cohort(data, data_format, None, reading)
    summary = import_embeddings(embeddings, cohort, store, overwrite=overwrite)
    show(summary.to_text, vars(summary))


@click.command()
@click.argument("parts", type=FILE, nargs=-1, required=True)
@option("--store", type=FILE, required=True, help="HDF5 file that is written.")
@option("--overwrite", is_flag=True, help="Replace a store that is already there.")
def merge(parts: tuple[Path, ...], store: Path, overwrite: bool) -> None:
    """Join the parts that `extract --part` made on several machines."""
    from cxr_cache.store.merge import merge as run_merge

    summary = run_merge(parts, store, overwrite=overwrite)
    show(summary.to_text, vars(summary))


@click.command()
@STORE
@option(
    "--out",
    type=FILE,
    required=True,
    help="File that is written: .npz (which import reads back), .csv or .parquet, by its ending.",
)
@option(
    "--features",
    type=click.Choice(FEATURES),
    default=TrainConfig.features,
    help="Which of them: the projected embedding, the pooled features that it is projected from, "
    "or the two side by side.",
)
def features(store: Path, out: Path, features: Features) -> None:
    """Write the features of a store, with ids and labels, for other programs."""
    from cxr_cache.store.exporting import export_features
    from cxr_cache.store.feature_store import FeatureStore

    with FeatureStore.open(store) as opened:
        said = export_features(opened, out, features=features)
    show(said, {"written": [out], "message": said})


def _image_progress(shown: Progress) -> Callable[[int, int, int], None]:
    def update(n_done: int, n_failed: int, n_total: int) -> None:
        shown.n_failed += n_failed
        shown.update(shown.n_done + n_done + n_failed, n_total)

    return update


def _load_cohort(
    data: Path, data_format: str, image_dir: Path | None, options: dict[str, Any]
) -> Cohort:
    """Read a data set, and say on stderr how it was understood."""
    from cxr_cache.datasets.readers import load_cohort

    cohort = load_cohort(data, data_format, image_dir=image_dir, config=ReadConfig(**options))
    if cohort.reading is not None:
        note(cohort.reading.to_text())
    return cohort
