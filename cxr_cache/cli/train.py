"""Commands that train: a head, many recipes for it, or the last blocks with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from cxr_cache.cli.options import (
    ALLOW_PENDING,
    FILE,
    FOLDER,
    GROUPS,
    LABELS,
    MODEL_OF_STORE,
    STORES,
    option,
    options_given,
    options_of,
    pick,
    warn_if_random,
)
from cxr_cache.cli.output import give, note, say
from cxr_cache.cli.progress import counting
from cxr_cache.config import (
    LOG_TO,
    RECIPES,
    AblateConfig,
    FinetuneConfig,
    RepeatConfig,
    TrainConfig,
)

_RECIPE: Final = option(
    "--recipe",
    type=click.Choice(RECIPES),
    default="tuned",
    help="Where the defaults of the options below come from: tuned was chosen on real radiographs; "
    "reference has the epochs, batch size and learning rates of the published notebook that "
    "docs/design.md compares with.",
)
_RUN_DIR: Final = option(
    "--run-dir", type=FOLDER, required=True, help="Folder that the run is written to."
)
_OVERWRITE: Final = option(
    "--overwrite", is_flag=True, help="Replace a run that is already in the folder."
)
_LOG_TO: Final = option(
    "--log-to",
    type=click.Choice(LOG_TO),
    multiple=True,
    help="Also tell every epoch to TensorBoard, Weights & Biases or MLflow; may be given several "
    "times. They write to the folder logs of the run, unless their own variables, such as "
    "MLFLOW_TRACKING_URI and WANDB_MODE, say otherwise.",
)


@click.command()
@STORES
@_RECIPE
@_RUN_DIR
@LABELS
@options_of(TrainConfig, recipes={"reference": TrainConfig.reference})
@options_of(RepeatConfig)
@GROUPS
@ALLOW_PENDING
@_OVERWRITE
@_LOG_TO
def train(
    stores: tuple[Path, ...],
    recipe: str,
    run_dir: Path,
    labels: Path | None,
    groups: Path | None,
    allow_pending: bool,
    overwrite: bool,
    n_repeats: int,
    log_to: tuple[str, ...],
    **options: Any,
) -> None:
    """Search the number of epochs by cross-validation, train, and test once.

    Of several STORES of the same images, made by several encoders, the features are read side by
    side. Labels and split come from the first.
    """
    from cxr_cache.jobs.runs import train_head
    from cxr_cache.jobs.tracking import tracking

    config = TrainConfig.of_recipe(recipe, **options_given(options))
    with tracking(log_to, run_dir, config) as on_epoch, counting("epochs") as on_progress:
        result = train_head(
            stores,
            run_dir,
            config,
            labels=labels,
            groups=groups,
            allow_pending=allow_pending,
            overwrite=overwrite,
            n_repeats=n_repeats,
            tell=say,
            on_progress=on_progress,
            on_epoch=on_epoch,
        )
        if on_epoch is not None:
            on_epoch.finish(result)
    warn_if_random(result.run.config["random_encoder"])
    give(result.to_dict())


@click.command()
@STORES
@option(
    "--out", type=FOLDER, required=True, help="Folder for the table and for the finished folds."
)
@option(
    "--set",
    "varied",
    multiple=True,
    metavar="NAME=A,B",
    help="Option of train and the values to try, such as lr=1e-4,1e-3 or hidden=512x256,256; and "
    "of several stores those that are read, such as store=a,b,a+b for a.h5, b.h5 and both. Given "
    "several times, all combinations are tried. n_train=50,200,all gives a learning curve: whole "
    "patients are drawn until each fold trains on about so many images; 1%,10%,all are shares.",
)
@option(
    "--recipe",
    type=click.Choice(RECIPES),
    default="tuned",
    help="Recipe that supplies every option the ablation does not vary.",
)
@options_of(AblateConfig)
@options_of(
    TrainConfig,
    *("n_folds", "split", "split_by", "level", "test_fraction", "seed", "device", "select_by"),
)
@LABELS
@ALLOW_PENDING
def ablate(
    stores: tuple[Path, ...],
    out: Path,
    varied: tuple[str, ...],
    recipe: str,
    labels: Path | None,
    allow_pending: bool,
    **options: Any,
) -> None:
    """Compare recipes or encoders on the same folds: a ranked table, and a plot.

    Several STORES of the same images are compared with each other and with all of them side by
    side, unless --set store= says otherwise. With --set n_train, also how the score grows with the
    number of training images.
    """
    from cxr_cache.jobs.runs import refit_best
    from cxr_cache.report.plots import draw_ablation, draw_curve
    from cxr_cache.report.report import write_curve_page
    from cxr_cache.training.ablate import make_settings, run_ablation
    from cxr_cache.training.baselines import BASELINES

    own = AblateConfig(**pick(AblateConfig, options))
    base = TrainConfig.of_recipe(recipe, **pick(TrainConfig, options))
    settings = make_settings(base, varied, n_sampled=own.n_sampled, seed=base.seed, stores=stores)
    with counting("folds") as on_progress:
        ablation = run_ablation(
            stores,
            out,
            settings,
            labels=labels,
            allow_pending=allow_pending,
            baselines=BASELINES if own.baselines else (),
            n_repeats=own.n_repeats,
            backend=own.backend,
            n_workers=own.n_workers,
            scheduler=own.scheduler,
            on_progress=on_progress,
        )
    warn_if_random(ablation.is_random)
    plot = draw_ablation(ablation.table, out / "ablation.png")
    say(ablation.to_text())
    say(f"Table and plot: {out / 'ablation.csv'}, {plot}")
    if ablation.curve is not None:
        plot = draw_curve(ablation.curve, out / "curve.png")
        page = write_curve_page(ablation, stores[0], out / "curve.html")
        say(f"Learning curve: {out / 'curve.csv'}, {plot}, {page}")
    best = None
    if own.refit:
        with counting("epochs") as on_progress:
            best = refit_best(
                ablation,
                stores,
                out / "best",
                n_jobs=own.n_workers or -1,
                labels=labels,
                allow_pending=allow_pending,
                overwrite=True,
                tell=say,
                on_progress=on_progress,
            )
    give(ablation.to_dict() | {"best": None if best is None else best.to_dict()})


@click.command()
@click.argument("stores", metavar="STORE", type=FILE, nargs=-1, required=True)
@_RECIPE
@_RUN_DIR
@option(
    "--from-run",
    type=FOLDER,
    help="Run of train on this store to start from: its split, kind of final model, rule of "
    "thresholds and its calibration are taken over, and its heads are trained further.",
)
@option("--image-dir", type=FOLDER, help="Folder with the images, to train from images.")
@LABELS
@options_of(FinetuneConfig, recipes={"reference": FinetuneConfig.reference})
@options_of(RepeatConfig)
@MODEL_OF_STORE
@GROUPS
@ALLOW_PENDING
@_OVERWRITE
@_LOG_TO
def finetune(
    stores: tuple[Path, ...],
    recipe: str,
    run_dir: Path,
    labels: Path | None,
    groups: Path | None,
    from_run: Path | None,
    image_dir: Path | None,
    model: str | None,
    allow_pending: bool,
    overwrite: bool,
    log_to: tuple[str, ...],
    n_repeats: int,
    **options: Any,
) -> None:
    """Train the last blocks of the encoder with the head, from tokens or images.

    A single number of epochs is used without a search. Under torchrun
    (`torchrun --nproc-per-node N -m cxr_cache finetune ...`) N processes share every batch.
    """
    from cxr_cache.jobs.runs import finetune_tail, is_another_process
    from cxr_cache.jobs.tracking import tracking
    from cxr_cache.models.run import Run
    from cxr_cache.training.frozen_start import config_from_run

    given = pick(FinetuneConfig, options_given(options))
    config = (
        FinetuneConfig.of_recipe(recipe, **given)
        if from_run is None
        else config_from_run(Run.open(from_run), recipe, **given)
    )
    with tracking(log_to, run_dir, config) as on_epoch, counting("epochs") as on_progress:
        result = finetune_tail(
            stores,
            run_dir,
            config,
            image_dir=image_dir,
            from_run=from_run,
            labels=labels,
            groups=groups,
            model=model,
            allow_pending=allow_pending,
            overwrite=overwrite,
            n_repeats=n_repeats,
            echo=note,
            tell=say,
            on_progress=on_progress,
            on_epoch=on_epoch,
        )
        if on_epoch is not None:
            on_epoch.finish(result)
    if is_another_process():  # of several, the first one reports
        return
    warn_if_random(result.run.config["random_encoder"])
    gained = None
    if from_run is not None:
        from cxr_cache.evaluation.compare import compare_runs

        gained = compare_runs(Run.open(from_run), result.run)
        say(gained.to_text())
    give(result.to_dict() | {"comparison": None if gained is None else gained.to_dict()})
