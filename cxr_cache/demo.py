"""The whole job on phantoms: a few minutes after installing, without data or network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cxr_cache.cohort import load_cohort
from cxr_cache.config import TrainConfig
from cxr_cache.encoder import load_encoder
from cxr_cache.evaluate import evaluate_run, format_summary
from cxr_cache.extract import extract_embeddings
from cxr_cache.phantoms import write_phantoms
from cxr_cache.report import write_report
from cxr_cache.run import Run
from cxr_cache.train import train_head

ENCODER = "random:vit_tiny_patch16_224"

# The reference's rate suits thousands of images; a few hundred need larger steps to get anywhere.
CONFIG = TrainConfig(epochs=(10, 20, 40), batch_size=32, learning_rate=1e-3)


def run_demo(
    folder: str | Path,
    *,
    n_studies: int = 250,
    seed: int = 0,
    echo: Callable[[str], object] = print,
) -> Path:
    """Draw phantoms, extract, train, evaluate and report; a second call redoes only the training.

    Parameters
    ----------
    folder
        Gets ``phantoms/``, ``features.h5`` and ``run/``.
    n_studies
        Phantom studies, of about 1.9 images each.
    seed
        Of the phantoms and the training.
    echo
        Prints a line.

    Returns
    -------
    Path
        The report.
    """
    folder = Path(folder)
    echo(f"1. Drawing {n_studies} studies of synthetic chest X-rays into {folder / 'phantoms'}")
    phantoms = write_phantoms(folder / "phantoms", n_studies=n_studies, seed=seed)
    echo(f"2. Extracting embeddings with {ENCODER}")
    echo("   RANDOM WEIGHTS: this encoder has never seen an image. It shows how the tool works,")
    echo("   not how well BiomedCLIP does; results say nothing about radiographs.")
    cohort = load_cohort(phantoms.csv_dir)
    encoder = load_encoder(ENCODER, precision="fp32")
    store_path = folder / "features.h5"
    echo(extract_embeddings(cohort, phantoms.image_dir, store_path, encoder).to_text())
    echo("3. Searching the number of epochs by cross-validation, training, testing once")
    result = train_head(store_path, folder / "run", CONFIG, overwrite=True)
    echo(result.to_text())
    run = Run.open(result.run.path)
    echo(format_summary(evaluate_run(run)))
    report = write_report(run)
    echo(f"Report: {report}")
    return report
