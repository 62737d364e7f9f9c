"""Commands that train: a head, many recipes for it, or the last blocks with it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import click

from cxr_cache.cli.options import (
    FILE,
    FOLDER,
    GROUPS,
    MODEL_OF_STORE,
    STORE,
    Command,
    calibration_option,
    counting,
    exit_status,
    options_given,
    threshold_rule_option,
    warn_if_random,
)
from cxr_cache.config import (
    BACKENDS,
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
    TRAINING_PRECISIONS,
    Augmentation,
    FinetuneConfig,
    Recipe,
    TrainConfig,
)
from cxr_cache.errors import CxrCacheError

_AFTER_TRAINING: Final = ("evaluate", "report")


def _numbers(separator: str) -> Callable[[click.Context, click.Parameter, str], tuple[int, ...]]:
    """A callback that reads whole numbers with `separator` between."""

    def parse(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in value.split(separator))
        except ValueError:
            example = separator.join(("50", "100"))
            raise click.BadParameter(f"{value!r} is not numbers such as {example}.") from None

    return parse


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
            help="plateau halves the rate when the validation loss stalls for more than --patience "
            "epochs.",
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
        click.option("--alpha", default=defaults.alpha, help="Of focal and focal-balanced."),
        click.option(
            "--gamma",
            default=defaults.gamma,
            help="Of the focal losses, class-balanced and asymmetric (whose authors take 4).",
        ),
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
        threshold_rule_option(defaults.threshold_rule),
        calibration_option(defaults.calibration),
        GROUPS,
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


@click.command()
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
    with counting("epoch") as on_progress:
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
    from cxr_cache.report.plots import draw_ablation
    from cxr_cache.training.ablate import make_settings, run_ablation
    from cxr_cache.training.baselines import BASELINES
    from cxr_cache.training.train import train_head

    base = TrainConfig.of_recipe(recipe, **options)
    settings = make_settings(base, varied, n_sampled=n_sampled, seed=base.seed)
    with counting("fold") as on_progress:
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
            on_progress=on_progress,
        )
    warn_if_random(ablation.is_random)
    plot = draw_ablation(ablation.table, out / "ablation.png")
    click.echo(ablation.to_text())
    click.echo(f"Table and plot: {out / 'ablation.csv'}, {plot}")
    if refit:
        result = train_head(
            store,
            out / "best",
            replace(ablation.best.config, n_jobs=workers or -1),
            labels=labels,
            allow_pending=allow_pending,
            overwrite=True,
        )
        click.echo(result.to_text())
        _evaluate_and_report(out / "best")


@click.command()
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
@MODEL_OF_STORE
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
    **recipe: Any,
) -> None:
    """Train the last blocks of the encoder with the head, from tokens or images.

    One number of --epochs is taken without a search. Under torchrun
    (`torchrun --nproc-per-node N -m cxr_cache finetune ...`) N processes share every batch.
    """
    from cxr_cache.models.run import Run
    from cxr_cache.training.finetune import finetune_tail
    from cxr_cache.training.frozen_start import config_from_run

    given = options_given(recipe)
    changes = {field.name for field in fields(Augmentation)}
    pixels = {name: given.pop(name) for name in changes & given.keys()}
    given["augmentation"] = Augmentation(**pixels)
    _require_groups(groups)
    config = (
        FinetuneConfig(**given)
        if from_run is None
        else config_from_run(Run.open(from_run), **given)
    )
    with counting("epoch") as on_progress:
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
