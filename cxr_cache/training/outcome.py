"""What a training leaves in its run folder: split, search, predictions, thresholds, model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import hash_file
from cxr_cache.common.wording import count, first_lines, list_names
from cxr_cache.config import OPTIMISM_OF_PLATEAU, Recipe
from cxr_cache.datasets.cohort import GIVEN, UNITS, Cohort, finding_table, name_unit
from cxr_cache.datasets.flow import Flow, format_flow, parse_flow
from cxr_cache.datasets.splits import Split, count_shared_studies, find_shared
from cxr_cache.datasets.studies import Studies
from cxr_cache.metrics.operating_point import choose_operating_point
from cxr_cache.metrics.scores import count_clusters
from cxr_cache.models.run import FINAL_FOLD, Run, SavedModel
from cxr_cache.models.unlikeness import fit_distribution
from cxr_cache.training.baselines import LogisticBaseline
from cxr_cache.training.search import EpochSearch, horizons


@dataclass(frozen=True)
class TrainResult:
    """A finished training: its folder, and what the search found."""

    run: Run
    epoch_search: EpochSearch
    notes: tuple[str, ...]
    metrics: dict[str, Any] | None = None
    """What ``metrics.json`` holds; None where the run was not evaluated."""

    def __repr__(self) -> str:
        return first_lines(f"{self.run!r}\n{self.to_text()}")

    @property
    def search(self) -> pd.DataFrame:
        """Columns epochs, mean_auroc, std_auroc, fold_1 ... fold_K."""
        return self.epoch_search.table

    @property
    def chosen_epochs(self) -> int:
        """What the final model was trained for."""
        return self.epoch_search.chosen

    def to_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_text` for programs, and what ``metrics.json`` holds."""
        return {
            "run": self.run.path,
            "chosen_epochs": self.chosen_epochs,
            "measure": self.epoch_search.weighing.measure,
            "search": self.search,
            "metrics": self.metrics,
            "notes": self.notes,
            "flow": parse_flow(self.run.read_table("flow")) if self.run.has_table("flow") else [],
            "test_reads": self.run.read_reads(),
        }

    def to_text(self) -> str:
        """The search table, the choice and what to know about the rows, for a terminal."""
        n_folds = len(self.epoch_search.trajectories[self.chosen_epochs])
        measure, lines = self.epoch_search.weighing.measure, []
        if self.run.is_nested:
            n_outer = self.run.config["train"]["n_outer_folds"]
            lines.append(
                f"Nested cross-validation: {n_outer} outer folds, each with a search of its own "
                "(below). The search on all images, for the model to use:"
            )
        if n_folds == 1:
            lines += [f"No search: {measure} on one held-out fold, which the thresholds come from"]
        else:
            lines += [f"Epoch search: {measure}, mean and spread over {n_folds} held-out folds"]
        for row in self.search.to_dict("records"):
            mark = "   <- chosen" if row["epochs"] == self.chosen_epochs and n_folds > 1 else ""
            spread = f" ± {row['std_auroc']:.4f}" if n_folds > 1 else ""
            n, noun = row["epochs"], "epoch" if row["epochs"] == 1 else "epochs"
            lines.append(f"  {n:>5} {noun:<6}  {row['mean_auroc']:.4f}{spread}{mark}")
        if self.run.config[self.run.config["kind"]]["schedule"] == "plateau":
            lines.append(f"  {OPTIMISM_OF_PLATEAU}")
        lines += self._describe_stops()
        if whose := self.run.config.get("split", {}).get("whose"):
            lines.append(f"Split as given by {whose}")
        if self.run.has_table("flow"):
            lines += format_flow(parse_flow(self.run.read_table("flow")))
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def _describe_stops(self) -> list[str]:
        """Folds that early stopping ended before the largest candidate."""
        trajectories = self.epoch_search.trajectories
        longest = max(trajectories)
        lengths = [len(fold.history) for fold in trajectories[longest]]
        if all(length == longest for length in lengths):
            return []
        stops = (
            f"fold {k} after {count(n, 'epoch')}" for k, n in enumerate(lengths, 1) if n < longest
        )
        return [f"  early stopping: {', '.join(stops)}"]


def note_split(split: Split, cohort: Cohort, level: str = "image") -> tuple[str, ...]:
    """What the split does to the figures: rare findings, and studies on both sides."""
    notes = [*split.notes]
    n_unnamed = int((cohort.patient_ids == "").sum())
    if 0 < n_unnamed < len(cohort):
        notes.append(
            f"{n_unnamed:,} of {count(len(cohort), level)} "
            f"{'names' if n_unnamed == 1 else 'name'} no patient. Their studies were kept whole; "
            "whether their patients have images on both sides is not known."
        )
    if cohort.names_nobody and level == "image" and split.by == "study" and not split.whose:
        notes.append(
            "No patient is named, and no study has two images, so nothing keeps images of one "
            "patient on one side of the split: if there are such, the figures are too good. A "
            "column that tells patients is given to `extract` with --patient-column."
        )
    unit = name_unit(cohort.patient_ids)
    train = ~split.is_test
    n_positive = count_clusters(cohort.targets[train] == 1, cohort.groups[train])
    rare = np.flatnonzero((n_positive > 0) & (n_positive < split.n_folds))
    if len(rare):
        notes.append(
            f"{count(len(rare), 'finding')} {'has' if len(rare) == 1 else 'have'} fewer positive "
            f"train {UNITS[unit]} than there are folds, so that some folds cannot score "
            f"{'it' if len(rare) == 1 else 'them'}: "
            f"{list_names([cohort.findings[f] for f in rare])}."
        )
    if split.by == "image" and not split.whose:
        shared = count_shared_studies(split.is_test, cohort.groups)
        n_test = int(split.is_test.sum())
        notes.append(
            f"Split by image: {shared:,} of {count(n_test, 'test image')} ({shared / n_test:.0%}) "
            f"{'has' if shared == 1 else 'have'} another image of the same "
            f"{unit} in train. Figures on test are therefore too good, "
            "and so are those of the folds, which are split in the same way. Use --split-by study."
        )
    return tuple(notes)


def describe_split(split: Split, cohort: Cohort) -> dict[str, Any]:
    """What a run records of its split: whose it is, and how many groups are on both sides."""
    return {
        "whose": split.whose,
        "n_shared": len(find_shared(split.is_test, cohort.groups)),
        "unit": name_unit(cohort.patient_ids),
    }


def describe_labels(path: Path | None) -> dict[str, str] | None:
    """What a run records of the CSV whose targets replaced the store's."""
    return None if path is None else {"path": str(path), "sha256": hash_file(path)}


def describe_codes(cohort: Cohort) -> dict[str, Any] | None:
    """What a run records of the label codes as they were written, and of what is made of them."""
    reading = cohort.reading
    return None if reading is None else {"policy": reading.policy, "codes": reading.codes}


def describe_head(config: Recipe) -> dict[str, Any]:
    """Say what a saved head looks like, and how embeddings are prepared for it.

    Means and spreads of ``input_norm="standard"`` are folded into the first layer of a trained
    head, so that the saved one reads embeddings as they are.
    """
    head = {name: getattr(config, name) for name in ("input_norm", "hidden", "dropout", "norm")}
    if config.input_norm == "standard":
        head["input_norm"] = "none"
    return head | {"features": getattr(config, "features", "projected"), "level": config.level}


def write_outcome(
    run: Run,
    cohort: Cohort,
    split: Split,
    search: EpochSearch,
    config: Recipe,
    *,
    predictions: NDArray[np.float32],
    features: NDArray[np.float32],
    final_history: list[dict[str, float]],
    make_model: Callable[[dict[str, float]], SavedModel],
    studies: Studies | None = None,
    baseline: LogisticBaseline | None = None,
    flow: Flow | None = None,
    files: NDArray[np.uint8] | None = None,
) -> None:
    """Write every file of a run but its figures and its page, and declare it finished.

    Predictions are probabilities of the final model for all rows of the cohort, ``(N, F)``, and
    `features` are what a head on the frozen encoder reads of them, ``(N, D)``; the model's
    history is empty where a fold's model is the final one. `make_model` makes the model to save,
    given the threshold of each finding, which is chosen on out-of-fold predictions. Where the rows
    are `studies`, the table of the split still names their images. The `baseline`, if there is one,
    is kept to stand beside the model. The `flow` is that of the images until here, and `files` are
    the digests of their files; without it no flow is written.
    """
    out_of_fold = np.full(cohort.targets.shape, np.nan, np.float32)
    for k, trajectory in enumerate(search.trajectories[search.chosen]):
        out_of_fold[split.held_out(k)] = trajectory.probabilities[search.chosen]
    held_out = np.flatnonzero(np.isfinite(out_of_fold).all(axis=1))  # train, or one fold of it
    point = choose_operating_point(
        cohort.targets[held_out],
        out_of_fold[held_out],
        rule=config.threshold_rule,
        calibration=config.calibration,
        clusters=cohort.groups[held_out],
        min_positives=config.min_positives,
    )
    run.save_model(make_model(point.by_finding(cohort.findings)).read_at(point))
    trained = ~split.is_test
    if found := fit_distribution(features[trained], split.fold[trained], seed=config.seed):
        run.save_distribution(found)
    splits = _split_table(cohort, split, studies)
    run.write_table("splits", splits)
    if flow is not None:
        is_test = (splits["split"] == "test").to_numpy()
        run.write_table("flow", flow.divide(is_test, split.n_folds, files).to_table())
    run.write_table("targets", finding_table(cohort, cohort.targets, ("image_id",)))
    run.write_table("epoch_search", search.table)
    run.write_table("history", _history_table(search, final_history, config))
    sides = np.where(split.is_test, "test", "train")
    run.write_table("predictions", _prediction_table(cohort, predictions, sides))
    run.write_table(
        "out_of_fold",
        _prediction_table(cohort.take(held_out), out_of_fold[held_out], sides[held_out]),
    )
    if baseline is not None:
        test = np.flatnonzero(split.is_test)
        table = _prediction_table(cohort.take(test), baseline.probabilities, sides[test])
        run.write_table("logistic", table)
        run.config["logistic"] = {"C": baseline.C, "mean_auroc": baseline.mean_auroc}
    run.config["findings_unlearnt"] = _list_unlearnt(cohort, trained)
    run.config |= {"chosen_epochs": search.chosen, "search_measure": search.weighing.measure}
    run.finish()


def _list_unlearnt(cohort: Cohort, trained: NDArray[np.bool_]) -> list[str]:
    """Findings that no training row has, or that none is without: nothing could be learnt."""
    targets = cohort.targets[trained]
    is_learnt = (targets == 1).any(axis=0) & (targets == 0).any(axis=0)
    return [name for name, learnt in zip(cohort.findings, is_learnt, strict=True) if not learnt]


def tabulate_repeats(
    cohort: Cohort, split: Split, tested: Sequence[NDArray[np.float32]]
) -> pd.DataFrame:
    """Tabulate the test predictions of every training, ``(n, F)`` each, numbered from 1."""
    of_test = cohort.take(np.flatnonzero(split.is_test))
    tables = [
        finding_table(of_test, probabilities).assign(repeat=repeat)
        for repeat, probabilities in enumerate(tested, start=1)
    ]
    table: pd.DataFrame = pd.concat(tables, ignore_index=True)
    return table


def _split_table(cohort: Cohort, split: Split, studies: Studies | None) -> pd.DataFrame:
    if studies is not None:
        cohort, of = studies.images, studies.study_of
        split = replace(split, is_test=split.is_test[of], fold=split.fold[of])
    table: pd.DataFrame = pd.DataFrame(
        {
            "image_id": cohort.image_ids,
            "study_uid": cohort.study_uids,
            "split": np.where(split.is_test, "test", "train"),
            "fold": pd.Series(split.fold + 1, dtype="Int64").mask(split.is_test),
        }
    )
    if split.whose:  # so that val, and what had no place, can still be told
        given = [name for name in GIVEN if name in cohort.images]
        table[given] = cohort.images[given]
    return table


def _prediction_table(
    cohort: Cohort, probabilities: NDArray[np.float32], sides: NDArray[np.str_]
) -> pd.DataFrame:
    table = finding_table(cohort, probabilities)
    table.insert(cohort.images.shape[1], "split", sides)
    return table


def _history_table(
    search: EpochSearch, final_history: list[dict[str, float]], config: Recipe
) -> pd.DataFrame:
    """Every epoch that was trained: of each fold up to the largest candidate, and of the final."""
    rows = [
        {"fold": str(k), "horizon": horizon, **row}
        for horizon in horizons(config)
        for k, trajectory in enumerate(search.trajectories[horizon], start=1)
        for row in trajectory.history
    ]
    rows += [{"fold": FINAL_FOLD, "horizon": search.chosen, **row} for row in final_history]
    table: pd.DataFrame = pd.DataFrame(rows)
    return table if config.has_horizon else table.drop(columns="horizon")
