"""The whole job on phantoms: a few minutes after installing, without data or network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import Any

from cxr_cache.config import ExtractConfig, TrainConfig
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.evaluation.compare import compare_runs
from cxr_cache.evaluation.evaluate import format_summary, score_run
from cxr_cache.models.run import Run
from cxr_cache.report.report import write_report
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.training.finetune import tune_run
from cxr_cache.training.frozen_start import config_from_run
from cxr_cache.training.outcome import TrainResult
from cxr_cache.training.train import fit_run

ENCODER = "random:test_vit"  # timm's smallest ViT: 6 blocks of width 64

# The recipe suits thousands of images and a trained encoder; a few hundred images and
# random weights need larger steps to get anywhere.
FROZEN = TrainConfig(epochs=(10, 20, 40), batch_size=32, learning_rate=1e-3, final="refit")
UNFREEZE_LAYERS = 4
TUNED: dict[str, Any] = {
    "epochs": (15,),
    "unfreeze_layers": UNFREEZE_LAYERS,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "head_learning_rate": 1e-3,
    "loss": "bce",
    "dropout": 0.2,
    "precision": "fp32",
}


def run_demo(
    folder: str | Path,
    *,
    n_studies: int = 450,
    seed: int = 0,
    echo: Callable[[str], object] = print,
) -> Path:
    """Draw phantoms, extract, train, fine-tune, evaluate, report; a second call only trains anew.

    Parameters
    ----------
    folder
        Gets ``phantoms/``, ``features.h5``, ``frozen/`` and ``finetuned/``.
    n_studies
        Phantom studies, of about 1.9 images each.
    seed
        Of the phantoms and the training.
    echo
        Prints a line.

    Returns
    -------
    Path
        The report of the fine-tuned run.
    """
    folder = Path(folder)
    echo(f"1. Drawing {n_studies} studies of synthetic chest X-rays into {folder / 'phantoms'}")
    phantoms = write_phantoms(folder / "phantoms", n_studies=n_studies, seed=seed)
    echo(f"2. Extracting embeddings and tokens with {ENCODER}")
    echo("   RANDOM WEIGHTS: this encoder has never seen an image. It shows how the tool works,")
    echo("   not how well BiomedCLIP does; results say nothing about radiographs.")
    cohort = load_cohort(phantoms.csv_dir)
    assert cohort.reading is not None
    cohort = replace(cohort, reading=replace(cohort.reading, format="phantoms"))
    encoder = load_encoder(ENCODER, precision="fp32")
    store_path = folder / "features.h5"
    caching = ExtractConfig(unfreeze_layers=UNFREEZE_LAYERS)
    echo(extract_embeddings(cohort, phantoms.image_dir, store_path, encoder, caching).to_text())
    echo("3. Searching the number of epochs by cross-validation, training a head, testing once")
    images = phantoms.image_dir
    frozen, report = _finish(
        fit_run(store_path, folder / "frozen", FROZEN, overwrite=True), images, echo
    )
    echo(f"   Report: {report}")
    echo("4. Fine-tuning the last blocks with that head, from the cached tokens, testing once")
    tuned, report = _finish(
        tune_run(
            store_path,
            folder / "finetuned",
            config_from_run(frozen, "reference", **TUNED),
            from_run=frozen.path,
            overwrite=True,
            echo=lambda text: echo(indent(text, "   ")),
        ),
        images,
        echo,
    )
    echo("What fine-tuning gained, on the same test studies:")
    echo(compare_runs(frozen, tuned).to_text())
    echo(f"Report: {report}")
    return report


def _finish(
    result: TrainResult, image_dir: Path, echo: Callable[[str], object]
) -> tuple[Run, Path]:
    """Evaluate and report a run, as the commands do, with pictures: phantoms are nobody's."""
    echo(result.to_text())
    run = Run.open(result.run.path)
    echo(format_summary(score_run(run)))
    return run, write_report(run, image_dir=image_dir)
