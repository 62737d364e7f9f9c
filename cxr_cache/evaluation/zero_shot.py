"""A store and its encoder's text tower -> what the encoder knows without any training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cxr_cache.common.wording import count, first_lines, list_names
from cxr_cache.config import CompareConfig
from cxr_cache.datasets.cohort import UNITS, Cohort, Unit, name_unit
from cxr_cache.encoders.identity import EncoderIdentity, require_same_encoder
from cxr_cache.encoders.text import PromptPair, TextEncoder
from cxr_cache.errors import TrainingError
from cxr_cache.evaluation.scored import read_scored
from cxr_cache.metrics.paired import Figure, JointAuroc, ScoredRows, score_jointly
from cxr_cache.metrics.scores import FloatArray
from cxr_cache.models.aligned import align_run
from cxr_cache.models.run import Run
from cxr_cache.models.split_reads import count_reading
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import find_done_rows

MACRO: Final = "macro"
_ZERO_SHOT, _RUN = "zero_shot", "run"


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """AUROC of prompts, finding by finding, beside a run's where there is one."""

    table: pd.DataFrame
    """Columns finding, n_positive, zero_shot, zero_shot_low, zero_shot_high and, with a run, run,
    run_low, run_high, difference, difference_low, difference_high; then the prompts, present and
    absent, as :func:`name_prompts` writes them. The last row is macro."""
    n_images: int
    n_studies: int
    unit: Unit
    """What was resampled."""
    rows: str
    """Which images these are, in words."""
    without_prompts: tuple[str, ...]
    is_of_run: bool
    """Whether it is a run's own encoder, on the run's test images: such a table belongs into the
    run's folder."""
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return first_lines(self.to_text())

    def to_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_text` for programs."""
        return {
            "rows": self.rows,
            "n_images": self.n_images,
            "n_studies": self.n_studies,
            "unit": self.unit,
            "findings": self.table,
            "without_prompts": self.without_prompts,
            "notes": self.notes,
        }

    def to_text(self) -> str:
        """A table for a terminal."""
        columns = [name for name in (_ZERO_SHOT, _RUN, "difference") if name in self.table]
        lines = [
            f"Zero-shot AUROC on {self.rows}: {count(self.n_images, 'image')} of "
            f"{count(self.n_studies, 'study')} [95 % intervals over {UNITS[self.unit]}]",
            f"  {'':<30}{'positive':>9}" + "".join(f"  {name:<24}" for name in columns),
        ]
        for row in self.table.to_dict("records"):
            n_positive = "" if row["finding"] == MACRO else f"{int(row['n_positive']):,}"
            line = f"  {row['finding']:<30}{n_positive:>9}"
            for name in columns:
                figure = Figure(row[name], row[f"{name}_low"], row[f"{name}_high"])
                sign = "+" if name == "difference" else ""
                line += f"  {figure.to_text(sign):<24}"
            lines.append(line.rstrip())
        if self.without_prompts:
            lines.append(f"No prompts for: {list_names(self.without_prompts)}")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def score_prompts(
    embeddings: NDArray[np.float32], text_encoder: TextEncoder, prompts: Sequence[PromptPair]
) -> NDArray[np.float32]:
    """Logit of each finding: the scaled difference of an image's cosines with a pair of prompts.

    Its sigmoid is the softmax over the two, as in Tiu et al., "Expert-level detection of
    pathologies from unannotated chest X-ray images via self-supervised learning" (CheXzero, 2022).
    Of several sentences the embeddings are averaged (Radford et al. 2021, section 3.1.4).

    Takes projected image features, encoder scale, ``(N, D)``, the text encoder of the same
    checkpoint, and a pair of prompts for each of F findings; gives ``(N, F)``.
    """
    directions = torch.stack(
        [
            _average(text_encoder, pair.present) - _average(text_encoder, pair.absent)
            for pair in prompts
        ]
    )  # (F, D)
    images = F.normalize(torch.from_numpy(embeddings), dim=-1)
    return (text_encoder.logit_scale * images @ directions.T).numpy()


def _average(text_encoder: TextEncoder, sentences: Sequence[str]) -> torch.Tensor:
    return F.normalize(text_encoder.embed(sentences).mean(dim=0), dim=-1)


def score_zero_shot(
    store: FeatureStore,
    text_encoder: TextEncoder,
    prompts: Mapping[str, PromptPair],
    *,
    run: Run | None = None,
    n_resamples: int = CompareConfig.n_resamples,
    seed: int = CompareConfig.seed,
) -> ZeroShot:
    """Score prompts on a run's test images, or on all of a store.

    Parameters
    ----------
    store
        Extracted with the encoder that the text tower belongs to.
    text_encoder
        As :func:`require_text_tower_of` has checked it.
    prompts
        By finding; findings without are left out.
    run
        Its test images, targets and predictions are taken; without one, all labelled images.
    n_resamples, seed
        Of the bootstrap.

    Raises
    ------
    RunError
        The run's test images are not in the store, or one of its tables is missing.
    TrainingError
        No finding has prompts.
    TableError
        The run's tables do not fit each other.
    StoreIncompleteError, StoreFormatError
        As :func:`cxr_cache.store.rows.find_done_rows`.

    Examples
    --------
    >>> with FeatureStore.open("features.h5") as store:  # doctest: +SKIP
    ...     text = load_text_encoder(store.header.encoder["name"])
    ...     found = score_zero_shot(store, text, load_prompts(), run=Run.open("runs/first"))
    >>> found.table  # doctest: +SKIP
    """
    images = _all_images(store) if run is None else _test_images(store, run)
    cohort = images.cohort
    chosen = [f for f, finding in enumerate(cohort.findings) if finding in prompts]
    if not chosen:
        raise TrainingError(
            f"None of the findings has prompts: {list_names(cohort.findings)}. Give a file with "
            "--prompts."
        )
    findings = [cohort.findings[f] for f in chosen]
    pairs = [prompts[finding] for finding in findings]
    targets, rows = cohort.targets[:, chosen], np.arange(len(cohort))
    embeddings = np.array(store.embeddings[images.rows, 0])
    models = {_ZERO_SHOT: ScoredRows(rows, targets, score_prompts(embeddings, text_encoder, pairs))}
    if images.probabilities is not None:
        models[_RUN] = ScoredRows(rows, targets, images.probabilities[:, chosen])
    areas = score_jointly(models, cohort.groups, n_resamples=n_resamples, seed=seed)
    if _RUN in areas:
        areas["difference"] = areas[_RUN].minus(areas[_ZERO_SHOT])
    table = tabulate_areas(findings, (targets == 1).sum(axis=0), areas)
    return ZeroShot(
        table=table.assign(**name_prompts(pairs)),
        n_images=len(cohort),
        n_studies=len(np.unique(cohort.study_uids)),
        unit=name_unit(cohort.patient_ids),
        rows="all labelled images" if run is None else f"the test images of {run.path}",
        without_prompts=tuple(f for f in cohort.findings if f not in prompts),
        is_of_run=run is not None and _is_encoder_of(run, store),
        notes=()
        if run is None
        else (*_notes(run, store), count_reading("zero-shot", run).to_text()),
    )


def require_text_tower_of(store: FeatureStore, encoder: EncoderIdentity) -> None:
    """Raise StoreMismatchError unless the images were embedded by the texts' own checkpoint.

    Texts of another model lie elsewhere.
    """
    require_same_encoder(
        store.header.encoder,
        encoder.to_dict(),
        "in the store",
        "in this encoder",
        "Its texts mean nothing beside these images. Use the store's encoder.",
        problem=f"{store.path} was not extracted with {encoder.name}",
    )


@dataclass(frozen=True, eq=False)
class _Images:
    """Rows of the store to score, and what is known of them."""

    rows: NDArray[np.intp]
    cohort: Cohort
    """Of these rows, with the targets to score."""
    probabilities: FloatArray | None


def _all_images(store: FeatureStore) -> _Images:
    done = find_done_rows(store, allow_pending=True)
    rows = done[~np.isnan(store.cohort.targets[done]).all(axis=1)]
    if not len(rows):
        raise TrainingError(f"None of the images of {store.path} has a label.")
    return _Images(rows, store.cohort.take(rows), None)


def _test_images(store: FeatureStore, run: Run) -> _Images:
    run.require_images("prompts are scored on single images")
    run.require_holdout("prompts are scored on these")
    scored = read_scored(run)
    done = find_done_rows(store, allow_pending=True)
    aligned = align_run(run, store.cohort.take(done), store.path, only_test=True)
    rows = pd.Index(scored.image_ids).get_indexer(pd.Index(aligned.cohort.image_ids))
    return _Images(done[aligned.places], aligned.cohort, scored.probabilities[rows])


def tabulate_areas(
    findings: Sequence[str], n_positive: NDArray[np.intp], areas: Mapping[str, JointAuroc]
) -> pd.DataFrame:
    """One row per finding, and the macro row, as :attr:`ZeroShot.table` describes them."""
    rows = []
    for f, finding in enumerate([*findings, MACRO]):
        chosen = n_positive if finding == MACRO else n_positive[f]
        row: dict[str, object] = {"finding": finding, "n_positive": int(np.sum(chosen))}
        for name, area in areas.items():
            figure = area.macro() if f == len(findings) else area.of_finding(f)
            row |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        rows.append(row)
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def name_prompts(pairs: Sequence[PromptPair]) -> dict[str, list[str]]:
    """Columns that say what was asked: of each finding its sentences, none of the macro row."""
    return {
        side: [*(" | ".join(getattr(pair, side)) for pair in pairs), ""]
        for side in ("present", "absent")
    }


def _is_encoder_of(run: Run, store: FeatureStore) -> bool:
    trained_with = {one["encoder"].get("weights_sha256") for one in run.stores}
    return store.header.encoder["weights_sha256"] in trained_with


def _notes(run: Run, store: FeatureStore) -> Iterator[str]:
    if run.config.get("kind") != "train":
        yield (
            f"{run.path} was fine-tuned. Zero-shot is that of the encoder before: the text tower "
            "was not trained along, so the prompts do not fit the tuned embeddings."
        )
    if not _is_encoder_of(run, store):
        yield (
            f"{store.path} was extracted with another encoder than {run.path} was trained with, so "
            "the table is not kept with the run."
        )
