"""Commands that use a run on image files, write it for others, or show the whole job."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import click

from cxr_cache.cli.options import (
    DEVICE,
    FILE,
    FOLDER,
    IMAGES,
    MODEL_OF_RUN,
    RUN,
    Names,
    load_encoder_of_run,
    load_encoders_of_run,
    option,
    options_of,
    require_folder,
    warn_if_random,
)
from cxr_cache.cli.output import give, say, show
from cxr_cache.cli.progress import counting
from cxr_cache.common.manifest import recording
from cxr_cache.config import DemoConfig, ExplainConfig

_FEW_IMAGES: Final = 100  # which take seconds, so that nobody waits for a line of progress


def _count_nothing(_n_done: int, _n_all: int) -> None:
    pass


@click.command()
@RUN
@IMAGES
@option(
    "--out",
    type=FILE,
    help="File to write instead of printing the likeliest findings: .csv, .json or .parquet, by "
    "its ending. After an interruption, the same command continues.",
)
@option(
    "--studies",
    type=FILE,
    help="For a run of --level study: CSV file with the columns image_id, study_uid and "
    "projection, which says what images make a study.  [default: each image is one]",
)
@option(
    "--model",
    "models",
    multiple=True,
    help="Name of the run's encoder, if it has moved; for a run of several stores, given once for "
    "each of their encoders.  [default: as recorded]",
)
@DEVICE
def predict(
    run: Path,
    images: tuple[Path, ...],
    out: Path | None,
    studies: Path | None,
    models: tuple[str, ...],
    device: str,
) -> None:
    """Give probabilities and decisions for image files, or folders of them.

    Of every image and finding it says present or absent where the run decides, "ranked only" where
    there were too few positives to choose a threshold, and "unknown" where nothing could be learnt;
    and of every image, how unlike the training images it is. docs/outputs.md describes the files.

    Exit status: 1 also if some images could not be used; the others are written.
    """
    from cxr_cache.common.wording import count
    from cxr_cache.models.run import Run

    paths = _require_files(images)
    if out is not None:
        require_folder(out.parent)
        from cxr_cache.models.predictions import require_writable_as_predictions

        require_writable_as_predictions(out)
    opened = Run.open(run)
    encoders = load_encoders_of_run(opened, models, device)
    from cxr_cache.models.predict import predict_images, predict_to_file

    with counting("images") if len(paths) > _FEW_IMAGES else nullcontext(_count_nothing) as shown:
        predictions = (
            predict_images(opened, paths, encoders, studies=studies, on_progress=shown)
            if out is None
            else predict_to_file(opened, paths, encoders, out, studies=studies, on_progress=shown)
        )
    if out is None:
        say(predictions.to_text())
    else:
        n_written = len(predictions.image_ids) - predictions.n_failed
        say(f"{n_written:,} predictions written to {out}")
        if predictions.n_unusual:
            unusual = count(predictions.n_unusual, predictions.row)
            say(f"{unusual} further from the training images than 99 % of these")
    give(
        {
            "written": [] if out is None else [out],
            "n_failed": predictions.n_failed,
            "n_unusual": predictions.n_unusual,
            "predictions": predictions.to_records() if out is None else None,
        }
    )
    if predictions.n_failed:
        n_all = count(len(predictions.image_ids), predictions.row)
        raise click.ClickException(f"{predictions.n_failed:,} of {n_all} could not be used.")


@click.command()
@RUN
@IMAGES
@option(
    "--finding",
    "findings",
    type=Names(),
    multiple=True,
    required=True,
    help="Name of a finding to draw; may be given several times.",
)
@option("--out", type=FOLDER, required=True, help="Folder that the pictures are written to.")
@options_of(ExplainConfig)
@option(
    "--raw",
    is_flag=True,
    help="Also write each map as a .npy file, of rows and columns of patches.",
)
@MODEL_OF_RUN
@DEVICE
def explain(
    run: Path,
    images: tuple[Path, ...],
    findings: tuple[str, ...],
    out: Path,
    raw: bool,
    model: str | None,
    device: str,
    **options: Any,
) -> None:
    """Draw where in image files (a folder means all its files) a finding was seen.

    The maps say what the model's answer rests on, not whether that is right.
    """
    from cxr_cache.models.explain import explain_images, parse_findings
    from cxr_cache.models.run import Run

    config = ExplainConfig(**options)
    paths = _require_files(images)
    opened = Run.open(run)
    names = parse_findings(opened, findings)
    encoder = load_encoder_of_run(opened, model, device)
    from cxr_cache.report.explanations import write_explanations

    maps = explain_images(opened, paths, names, encoder, **vars(config))
    n_written, failures = write_explanations(maps, out, raw=raw)
    show(
        f"{n_written:,} pictures written to {out}",
        {"written": [out], "n_pictures": n_written, "failures": failures},
    )
    if failures:
        raise click.ClickException(
            f"{len(failures):,} of {len(paths):,} images could not be used:\n" + "\n".join(failures)
        )


@click.command()
@RUN
@option(
    "--format",
    "file_format",
    type=click.Choice(["open-clip", "onnx", "hub"]),
    required=True,
    help="Format of the export. open-clip is a folder for local-dir:, with the head beside it; "
    "onnx is one file, from pixels to probabilities; hub is a folder for a repository on the "
    "Hugging Face Hub, with the model card and what was trained, which names the encoder and does "
    "not hold it. Nothing is uploaded.",
)
@option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder or file that is written."
)
@MODEL_OF_RUN
@option("--overwrite", is_flag=True, help="Replace an earlier export.")
def export(run: Path, file_format: str, out: Path, model: str | None, overwrite: bool) -> None:
    """Write a run's model for use without cxr-cache, or for a repository on the Hub."""
    from cxr_cache.models.export import export_run
    from cxr_cache.models.run import Run

    opened = Run.open(run)
    summary = export_run(opened, out, file_format, model=model, overwrite=overwrite)
    warn_if_random(opened.config["random_encoder"])
    show(summary.to_text, vars(summary))


@click.command()
@click.argument("folder", type=FOLDER)
@options_of(DemoConfig)
@option(
    "--open",
    "opens",
    is_flag=True,
    help="Open the page that it ends with in the browser; where there is none, its path is "
    "printed.",
)
def demo(folder: Path, opens: bool, **options: Any) -> None:
    """Show the whole job on synthetic chest X-rays, without data or a network.

    It prints each command that it runs: extraction, a frozen head, fine-tuned blocks, a test on
    another hospital's images, and the page that compares. Given again after an interruption, it
    goes on where it stopped.
    """
    from cxr_cache.cli.demo import open_page, run_demo

    page = run_demo(folder, _run_command, **vars(DemoConfig(**options)), echo=say)
    if opens:
        open_page(page, echo=say)
    give({"written": [page]})


def _run_command(words: list[str]) -> None:
    """Run a command as the shell would, below the group that runs now."""
    group = click.get_current_context().find_root()
    assert isinstance(group.command, click.Group)
    command, kept = group.command.commands[words[0]], dict(group.meta)
    try:
        with (
            recording(words),
            command.make_context(words[0], words[1:], parent=group) as context,
        ):
            command.invoke(context)
    finally:
        group.meta.update(kept)  # the command has options of its own, such as --json


@click.command()
@click.argument("folder", type=FOLDER, default=Path())
def doctor(folder: Path) -> None:
    """Say what works on this machine and in a folder, and what not.

    FOLDER is where stores and runs would be written, the current one if none is named. Nothing is
    asked of the network, and nothing is left in the folder.

    Exit status: 0 if the main job can run here, 1 if something that it needs is broken.
    """
    from cxr_cache.jobs.doctor import diagnose

    require_folder(folder)
    found = diagnose(folder)
    show(found.to_text, found.to_dict())
    click.get_current_context().exit(0 if found.is_working else 1)


def _require_files(images: tuple[Path, ...]) -> list[Path]:
    paths = [path for image in images for path in _files_of(image)]
    if not paths:
        raise click.ClickException("There are no files in the folders given.")
    return paths


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file())
