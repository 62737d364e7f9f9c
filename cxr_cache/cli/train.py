"""Commands that train: a head, many recipes for it, or the last blocks with it."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click

from cxr_cache.cli.options import (
    ALLOW_PENDING,
    FOLDER,
    GROUPS,
    LABELS,
    MODEL_OF_STORE,
    STORE,
    exit_status,
    option,
    options_given,
    options_of,
    pick,
    warn_if_random,
)
from cxr_cache.cli.progress import counting
from cxr_cache.config import RECIPES, AblateConfig, FinetuneConfig, TrainConfig
from cxr_cache.errors import CxrCacheError

_AFTER_TRAINING: Final = ("evaluate", "report")
_RUN_DIR: Final = option(
    "--run-dir", type=FOLDER, required=True, help="Folder that the run is written to."
)
_OVERWRITE: Final = option(
    "--overwrite", is_flag=True, help="Replace a run that is already in the folder."
)


@click.command()
@STORE
@option(
    "--recipe",
    type=click.Choice(tuple(RECIPES)),
    default="tuned",
    help="Where the defaults of the options below come from: tuned was chosen on real radiographs; "
    "reference is that of the published notebook.",
)
@_RUN_DIR
@LABELS
@options_of(TrainConfig, recipes=RECIPES)
@GROUPS
@ALLOW_PENDING
@_OVERWRITE
def train(
    store: Path,
    recipe: str,
    run_dir: Path,
    labels: Path | None,
    groups: Path | None,
    allow_pending: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Search the number of epochs by cross-validation, train, and test once."""
    from cxr_cache.training.fit_on_cores import release_cores
    from cxr_cache.training.train import train_head

    config = TrainConfig.of_recipe(recipe, **options_given(options))
    _require_groups(groups)
    with counting("epochs") as on_progress:
        result = train_head(
            store,
            run_dir,
            config,
            labels=labels,
            allow_pending=allow_pending,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    release_cores()  # evaluating needs the memory
    warn_if_random(result.run.config["random_encoder"])
    click.echo(result.to_text())
    _evaluate_and_report(run_dir, groups)


@click.command()
@STORE
@option(
    "--out", type=FOLDER, required=True, help="Folder for the table and for the finished folds."
)
@option(
    "--set",
    "varied",
    multiple=True,
    metavar="NAME=A,B",
    help="Option of train and the values to try, such as lr=1e-4,1e-3 or hidden=512x256,256. Given "
    "several times, all combinations are tried.",
)
@option(
    "--recipe",
    type=click.Choice(tuple(RECIPES)),
    default="tuned",
    help="Recipe that supplies every option the ablation does not vary.",
)
@options_of(AblateConfig)
@options_of(TrainConfig, "n_folds", "split_by", "test_fraction", "seed", "device")
@LABELS
@ALLOW_PENDING
def ablate(
    store: Path,
    out: Path,
    varied: tuple[str, ...],
    recipe: str,
    labels: Path | None,
    allow_pending: bool,
    **options: Any,
) -> None:
    """Compare recipes for the head on the same folds: a ranked table, and a plot."""
    from cxr_cache.report.plots import draw_ablation
    from cxr_cache.training.ablate import make_settings, run_ablation
    from cxr_cache.training.baselines import BASELINES
    from cxr_cache.training.train import train_head

    own = AblateConfig(**pick(AblateConfig, options))
    base = TrainConfig.of_recipe(recipe, **pick(TrainConfig, options))
    settings = make_settings(base, varied, n_sampled=own.n_sampled, seed=base.seed)
    with counting("folds") as on_progress:
        ablation = run_ablation(
            store,
            out,
            settings,
            labels=labels,
            allow_pending=allow_pending,
            baselines=BASELINES if own.baselines else (),
            backend=own.backend,
            n_workers=own.n_workers,
            scheduler=own.scheduler,
            on_progress=on_progress,
        )
    warn_if_random(ablation.is_random)
    plot = draw_ablation(ablation.table, out / "ablation.png")
    click.echo(ablation.to_text())
    click.echo(f"Table and plot: {out / 'ablation.csv'}, {plot}")
    if own.refit:
        result = train_head(
            store,
            out / "best",
            replace(ablation.best.config, n_jobs=own.n_workers or -1),
            labels=labels,
            allow_pending=allow_pending,
            overwrite=True,
        )
        click.echo(result.to_text())
        _evaluate_and_report(out / "best")


@click.command()
@STORE
@_RUN_DIR
@option(
    "--from-run",
    type=FOLDER,
    help="Run of train on this store to start from: its split, its number of epochs, its rule of "
    "thresholds and its calibration are taken over, and its heads are trained further.",
)
@option("--image-dir", type=FOLDER, help="Folder with the images, to train from images.")
@LABELS
@options_of(FinetuneConfig)
@MODEL_OF_STORE
@GROUPS
@ALLOW_PENDING
@_OVERWRITE
def finetune(
    store: Path,
    run_dir: Path,
    labels: Path | None,
    groups: Path | None,
    from_run: Path | None,
    image_dir: Path | None,
    model: str | None,
    allow_pending: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Train the last blocks of the encoder with the head, from tokens or images.

    A single number of epochs is used without a search. Under torchrun
    (`torchrun --nproc-per-node N -m cxr_cache finetune ...`) N processes share every batch.
    """
    from cxr_cache.models.run import Run
    from cxr_cache.training.finetune import finetune_tail
    from cxr_cache.training.frozen_start import config_from_run

    given = pick(FinetuneConfig, options_given(options))
    _require_groups(groups)
    config = (
        FinetuneConfig(**given)
        if from_run is None
        else config_from_run(Run.open(from_run), **given)
    )
    with counting("epochs") as on_progress:
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
            on_progress=on_progress,
        )
    if _is_another_process():  # of several, the first one reports
        return
    warn_if_random(result.run.config["random_encoder"])
    click.echo(result.to_text())
    if from_run is None:
        _evaluate_and_report(run_dir, groups)
        return
    from cxr_cache.evaluation.compare import compare_runs

    frozen = Run.open(from_run)
    _evaluate_and_report(run_dir, groups or frozen.groups_path)
    click.echo(compare_runs(frozen, Run.open(run_dir)).to_text())


def _is_another_process() -> bool:
    """Whether torchrun started this one beside the first."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def _require_groups(groups: Path | None) -> None:
    """Refuse a table that cannot be read, before anything takes long."""
    if groups is not None:
        from cxr_cache.evaluation.scored import read_groups

        read_groups(groups)


def _evaluate_and_report(run_dir: Path, groups: Path | None = None) -> None:
    from cxr_cache.evaluation.evaluate import evaluate_run, format_summary
    from cxr_cache.models.run import Run
    from cxr_cache.report.report import write_report

    run = Run.open(run_dir)
    commands = (shlex.join(["cxr-cache", verb, str(run_dir)]) for verb in _AFTER_TRAINING)
    left = f"{run_dir} is trained; what is left to do:\n" + "\n".join(commands)
    try:
        click.echo(format_summary(evaluate_run(run, groups=groups)))
        click.echo(f"Report: {write_report(run)}")
    except CxrCacheError as error:
        raise click.ClickException(f"{error}\n{left}") from error
    except KeyboardInterrupt as stop:
        click.echo(f"\nStopped. {left}", err=True)
        click.get_current_context().exit(exit_status(stop))
