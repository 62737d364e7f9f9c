"""Test a run on another data set, and leave what the run's own test leaves."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Final, get_args

from cxr_cache.common.files import disk_errors_named, write_whole
from cxr_cache.config import EncoderOptions, EvaluateConfig, ExternalConfig, parse_relations
from cxr_cache.datasets.labels import read_labels
from cxr_cache.encoders.loading import reload_encoder
from cxr_cache.errors import RunError
from cxr_cache.evaluation.external import ExternalEvaluation, score_external
from cxr_cache.evaluation.matching import (
    match_findings,
    name_data_set,
    name_data_set_of_run,
    require_scored,
)
from cxr_cache.evaluation.overlap import find_overlap
from cxr_cache.models.predict import predict_store
from cxr_cache.models.run import Run, TableName
from cxr_cache.models.split_reads import count_reading_beside
from cxr_cache.report.report import write_external_report
from cxr_cache.store.side_by_side import StorePaths, list_stores, open_stores

logger = logging.getLogger(__name__)

_MARK: Final = "matching.csv"
"""Written first, so that an interrupted test is known for one."""


def evaluate_on_store(
    run: Run,
    store_path: StorePaths,
    *,
    labels: str | Path | None = None,
    name_map: str | Path | None = None,
    relations: str = ExternalConfig.relations,
    out: str | Path | None = None,
    groups: str | Path | None = None,
    n_resamples: int = EvaluateConfig.n_resamples,
    seed: int = EvaluateConfig.seed,
    model: str | None = None,
    device: str = EncoderOptions.device,
) -> ExternalEvaluation:
    """Score a run on the images of another store: an external test set.

    Thresholds and calibration are the run's own. Findings of the run that the other data set does
    not label stay unlabelled and are not scored. Images that belong to the run's own data, or may,
    are warned of: their figures are too good.

    Parameters
    ----------
    run
        A finished run.
    store_path
        Feature store of the same encoder; for a run of several stores, one of each encoder, in the
        run's order and of the same images.
    labels
        Table whose targets replace the store's; see
        :func:`cxr_cache.datasets.labels.read_labels`.
    name_map
        CSV that says which finding of the other data set stands for which of the run's; see
        :func:`cxr_cache.evaluation.matching.match_findings`.
    relations
        Which findings of the other data set are scored, such as ``"same,broader"``.
    out
        Folder for what a run's own test leaves: tables, metrics, plots and the page; or a file
        whose name ends in ``.json``, for the metrics alone. None writes nothing.
    groups, n_resamples, seed
        As in :func:`cxr_cache.evaluation.evaluate.evaluate_predictions`.
    model, device
        For a fine-tuned run, whose last blocks are computed anew: the encoder, if it has moved, and
        the device.

    Raises
    ------
    StoreMismatchError
        The store is of another encoder, or lacks the tokens that the run's blocks read; or there
        are not as many stores as the run was trained on.
    TableError
        The other data set labels none of the run's findings, or a table cannot be read.
    ConfigError
        There is no such relation.
    RunError
        `out` holds something else.

    Examples
    --------
    >>> run = Run.open("runs/first")  # doctest: +SKIP
    >>> external = evaluate_on_store(run, "other_hospital.h5", out="external")  # doctest: +SKIP
    >>> external.metrics["test"]["macro_auroc"]  # doctest: +SKIP
    """
    wanted = parse_relations(relations)
    folder = None if out is None or _is_json(out) else _require_free(Path(out))
    paths = list_stores(store_path)
    with open_stores(store_path) as (features, *further):
        cohort = features.cohort if labels is None else read_labels(labels, features.cohort)
        data_set = "" if labels else name_data_set(features.findings, features.header.reading)
        matching = match_findings(
            run.config["findings"],
            cohort.findings,
            our_data_set=name_data_set_of_run(run.config),
            their_data_set=data_set,
            own=name_map,
            relations=wanted,
        )
        require_scored(matching, run.path, labels or paths[0])
        encoder = None
        if run.load_model().tail is not None and not features.header.encoder.get("imported"):
            encoder = reload_encoder(features.header.encoder, model=model, device=device)
        predictions, targets = predict_store(
            run, features, encoder, None if labels is None else cohort, further=further
        )
        overlap = find_overlap(run, features, predictions)
    for warning in overlap.warnings:
        logger.warning("%s", warning)
    evaluation = score_external(
        run,
        predictions,
        targets,
        matching,
        overlap,
        described={
            "store": str(paths[0]),
            **({"further_stores": [str(path) for path in paths[1:]]} if further else {}),
            "data_set": data_set,
            "labels": None if labels is None else str(labels),
            "map": None if name_map is None else str(name_map),
            "relations": list(wanted),
        },
        groups=groups,
        n_resamples=n_resamples,
        seed=seed,
    )
    reads = count_reading_beside(
        Path(paths[0]), evaluation.tables["predictions"]["image_id"], "evaluate --store", [run]
    )
    evaluation = replace(evaluation, reads=reads)
    if folder is not None:
        _write(run, evaluation, folder)
    elif out is not None:
        write_whole(Path(out), json.dumps(evaluation.metrics, indent=2).encode())
    return evaluation


def _is_json(out: str | Path) -> bool:
    return Path(out).suffix.lower() == ".json"


def _require_free(folder: Path) -> Path:
    """Raise unless the folder is empty, new, or holds an earlier test of this kind."""
    if folder.exists() and not folder.is_dir():
        raise RunError(
            f"{folder} is a file; --out takes a folder, or a file whose name ends in .json."
        )
    others = [path for path in folder.glob("*") if path.name[0] != "."]
    if others and not (folder / _MARK).is_file():
        raise RunError(
            f"{folder} holds other files and no external test. Choose a folder of its own."
        )
    return folder


def _write(run: Run, evaluation: ExternalEvaluation, folder: Path) -> None:
    """Leave tables, metrics, plots and page; what an earlier test left there goes."""
    with disk_errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    test = Run(folder, {**run.config, "warnings": evaluation.metrics["external"]["warnings"]})
    test.write_table("matching", evaluation.matching.table)
    for name in get_args(TableName):
        if name not in evaluation.tables:
            (folder / f"{name}.csv").unlink(missing_ok=True)
    test.write_evaluation(evaluation.metrics, evaluation.tables)
    if evaluation.reads is not None:
        test.write_reads(evaluation.reads.to_dict())
    write_external_report(test)
