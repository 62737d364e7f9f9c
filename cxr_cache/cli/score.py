"""Commands that judge runs: their figures, differences and pages."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from cxr_cache.cli.options import (
    DEVICE,
    FILE,
    FOLDER,
    GROUPS,
    MODEL_OF_STORE,
    RUN,
    RUNS,
    STORE,
    load_encoder_of_run,
    load_encoder_of_store,
    option,
    options_given,
    options_of,
    pick,
    require_folder,
)
from cxr_cache.cli.output import give, note, say, show
from cxr_cache.cli.progress import counting
from cxr_cache.config import CardConfig, CompareConfig, EvaluateConfig, ExternalConfig


@click.command()
@RUN
@option(
    "--store",
    "stores",
    type=FILE,
    multiple=True,
    help="Store of an external test set to score the run on. For a run of several stores, given "
    "once for each, in the order of the run's.",
)
@option(
    "--labels",
    type=FILE,
    help="With --store: CSV file of labels to use instead of the store's, as `train` takes it.",
)
@option(
    "--map",
    "name_map",
    type=FILE,
    help="With --store: CSV file with the columns finding (the run's), store_finding and relation, "
    "that says which findings belong together. Others are matched by their names.",
)
@options_of(ExternalConfig)
@option(
    "--out",
    type=click.Path(path_type=Path),
    help="With --store: folder for tables, metrics, plots and the page of this test; or a file "
    "whose name ends in .json, for the metrics alone.",
)
@options_of(EvaluateConfig)
@GROUPS
@option(
    "--model",
    help="With --store, for a fine-tuned run: name of the encoder, if it has moved.  [default: as "
    "recorded]",
)
@DEVICE
def evaluate(run: Path, stores: tuple[Path, ...], groups: Path | None, **options: Any) -> None:
    """Score a run's predictions, with intervals; or the run on another store.

    --threshold-rule, --calibration and --min-positives choose anew, on the run's out-of-fold
    predictions, and are stored with its model.

    With --store, findings are matched by their names and by a table of names that mean the same, or
    only look so. What is matched, what not and why is printed first.
    """
    from cxr_cache.evaluation.evaluate import format_summary
    from cxr_cache.jobs.scoring import evaluate_run, tell_of_reads
    from cxr_cache.models.run import Run

    of_external = ("out", "labels", "name_map", "relations")
    given = options_given({name: options[name] for name in of_external})
    if not stores and given:
        flag = {"name_map": "map"}.get(name := min(given), name)
        why = "; a run keeps its own metrics.json" if name == "out" else ""
        raise click.UsageError(f"--{flag} goes with --store{why}.")
    config = EvaluateConfig(**pick(EvaluateConfig, options))
    chosen = (config.threshold_rule, config.calibration, config.min_positives)
    if stores and chosen != (None, None, None):
        raise click.UsageError(
            "--threshold-rule, --calibration and --min-positives choose on the run's own "
            "out-of-fold predictions, never on another store. Evaluate the run with them first."
        )
    opened = Run.open(run)
    if not stores:
        metrics = evaluate_run(opened, groups=groups, **vars(config))
        told_of = tell_of_reads(opened)
        told = metrics | {"test_reads": opened.read_reads()}
        show(lambda: f"{format_summary(metrics)}\n{told_of}", told)
        return
    from cxr_cache.jobs.external import evaluate_on_store  # may need the encoder: imports torch

    evaluation = evaluate_on_store(
        opened,
        stores,
        groups=groups,
        n_resamples=config.n_resamples,
        seed=config.seed,
        **{name: options[name] for name in (*of_external, "model", "device")},
    )
    reads = None if evaluation.reads is None else evaluation.reads.to_dict()
    show(evaluation.to_text, evaluation.metrics | {"test_reads": reads})
    if (out := options["out"]) is not None:
        say(f"Report: {out / 'report.html'}" if out.is_dir() else f"{out} written")


@click.command()
@RUNS
@option("--out", type=FOLDER, help="Folder that comparison.csv and comparison.png are written to.")
@options_of(CompareConfig)
def compare(runs: tuple[Path, ...], out: Path | None, **options: Any) -> None:
    """Tell how much better runs are than the first, on the same test studies.

    RUNS may also be folders that `evaluate --store OTHER --out` wrote for several runs on the same
    store: then they are compared on that data set.
    """
    from cxr_cache.evaluation.compare import compare_runs, open_tested

    config = CompareConfig(**options)
    if len(runs) < 2:
        raise click.UsageError("Give two runs or more; the others are compared with the first.")
    comparison = compare_runs(*map(open_tested, runs), **vars(config))
    say(comparison.to_text())
    written: tuple[Path, ...] = ()
    if out is not None:
        from cxr_cache.report.plots import write_comparison

        written = tuple(write_comparison(comparison, out))
        for path in written:
            say(f"{path} written")
    give(comparison.to_dict() | {"written": written})


@click.command("zero-shot")
@STORE
@option("--run-dir", type=FOLDER, help="Run whose test images are scored beside its own head.")
@option(
    "--prompts",
    type=FILE,
    help='JSON file that names each finding\'s texts: {"Mass": {"present": ["a mass"], "absent": '
    '["no mass"]}}.  [default: prompts for the 35 findings]',
)
@option("--out", type=FILE, help="CSV file that the table is written to.")
@options_of(CompareConfig)
@MODEL_OF_STORE
def zero_shot(
    store: Path,
    run_dir: Path | None,
    prompts: Path | None,
    out: Path | None,
    model: str | None,
    **options: Any,
) -> None:
    """Score what the encoder answers to text prompts alone, without training.

    With --run-dir the table is kept in the run's folder, and `report` shows it on the run's page.

    Needs an encoder with a text tower, and pip install 'cxr-cache[text]' for BiomedCLIP's.
    """
    from cxr_cache.common.tables import write_table
    from cxr_cache.encoders.text import load_prompts, load_text_encoder
    from cxr_cache.evaluation.zero_shot import require_text_tower_of, score_zero_shot
    from cxr_cache.jobs.zero_shot import keep_zero_shot
    from cxr_cache.models.run import Run
    from cxr_cache.store.feature_store import FeatureStore

    config = CompareConfig(**options)
    if out is not None:
        require_folder(out.parent)
    pairs = load_prompts(prompts)
    run = None if run_dir is None else Run.open(run_dir)
    remedy = "Extract the images with a model that has a text tower."
    encoder = load_encoder_of_store(store, model, "cpu", remedy).identity
    with FeatureStore.open(store) as features:
        require_text_tower_of(features, encoder)
        found = score_zero_shot(
            features,
            load_text_encoder(encoder.name),
            pairs,
            run=run,
            **vars(config),
        )
    say(found.to_text())
    if out is not None:
        write_table(out, found.table, digits=6)
    kept = "" if run is None else keep_zero_shot(run, found)
    if kept:
        say(kept)
    give(found.to_dict() | {"kept": kept})


@click.command()
@RUNS
@option(
    "--out",
    type=FILE,
    default="comparison.html",
    help="HTML file of the page of several runs. The page of one run is report.html in its folder.",
)
@option(
    "--image-dir",
    type=FOLDER,
    help="Folder with the images: the page then shows small pictures of hits, misses and false "
    "alarms, and may be shared only if they may be.",
)
@option(
    "--maps",
    is_flag=True,
    help="With --image-dir, for one run: also show where the model looked in these pictures. Each "
    "takes a pass through the encoder, and there are up to 12 for each of 40 findings: minutes "
    "without a GPU.",
)
@option(
    "--model",
    help="With --maps: name of the run's encoder, if it has moved.  [default: as recorded]",
)
@DEVICE
@options_of(CardConfig)
@options_of(CompareConfig, "n_resamples")
def report(
    runs: tuple[Path, ...],
    out: Path,
    image_dir: Path | None,
    maps: bool,
    model: str | None,
    device: str,
    n_resamples: int,
    **card: str,
) -> None:
    """Write the plots, page and model card of a run, or one page for several RUNS.

    Several runs must have been tested on the same studies; differences are to the first.
    """
    from cxr_cache.models.run import Run
    from cxr_cache.report.report import write_joint_report, write_report

    if maps and (image_dir is None or len(runs) > 1):
        raise click.UsageError("--maps goes with --image-dir and one run.")
    if not maps and (idle := options_given({"model": model, "device": device})):
        raise click.UsageError(f"--{min(idle)} goes with --maps.")
    config = CompareConfig(n_resamples)
    opened = [Run.open(run) for run in runs]
    if len(opened) > 1:
        page = write_joint_report(opened, out, image_dir=image_dir, n_resamples=config.n_resamples)
    else:
        encoder = load_encoder_of_run(opened[0], model, device) if maps else None
        with counting("maps") if maps else nullcontext() as on_progress:
            page = write_report(
                opened[0],
                image_dir=image_dir,
                **card,
                encoder=encoder,
                on_progress=on_progress,
            )
    show(f"Report: {page}", {"written": [page]})


@click.command()
@RUN
@option("--out", type=FILE, help="Markdown file that is written.  [default: the terminal]")
def checklist(run: Path, out: Path | None) -> None:
    """Fill the checklists CLAIM 2024 and TRIPOD+AI with what a run knows.

    Each item holds facts of the run, or says that it is to be written by the authors. Nothing is
    guessed.
    """
    from cxr_cache.models.run import Run
    from cxr_cache.report.checklist import render_checklists
    from cxr_cache.report.views import read_view

    if out is not None:
        require_folder(out.parent)
    text = render_checklists(read_view(Run.open(run)))
    _give_text(text, "checklists", out)


@click.command()
@RUN
@option(
    "--external",
    type=FOLDER,
    help="Folder of a test on another data set, which `evaluate --store ... --out` wrote: it is "
    "described too.",
)
@option("--out", type=FILE, help="Markdown file to write instead of printing; it may not exist.")
def methods(run: Path, external: Path | None, out: Path | None) -> None:
    """Write the methods section of a paper from what a run recorded.

    Nothing is guessed: what a paper must say and the run does not know stands in square brackets.
    """
    from cxr_cache.models.run import Run
    from cxr_cache.report.methods import describe_methods, find_blanks

    if out is not None:
        require_folder(out.parent)
        if out.exists():
            raise click.ClickException(
                f"{out} is there already, and may hold what you filled in. Choose another name."
            )
    text = describe_methods(Run.open(run), external=external)
    _give_text(text, "methods", out)
    blanks = "\n".join(f"  [{blank}]" for blank in find_blanks(text))
    note(f"To be filled in, as the run does not know it:\n{blanks}")


def _give_text(text: str, what: str, out: Path | None) -> None:
    """Print a text in Markdown, or write it where a file is given."""
    if out is None:
        show(text.rstrip(), {what: text})
        return
    from cxr_cache.common.files import write_whole

    write_whole(out, text.encode())
    show(f"{out} written", {"written": [out]})
