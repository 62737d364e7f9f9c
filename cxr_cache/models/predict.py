"""A run and new images, or another store, to probabilities."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxr_cache.common.wording import count, describe_differences, find_differences, list_names
from cxr_cache.datasets.cohort import Cohort, finding_table
from cxr_cache.datasets.images import find_unused_bits, read_image
from cxr_cache.datasets.studies import group_by_study, read_studies
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.encoding import decode_tokens
from cxr_cache.encoders.identity import require_not_imported, require_same_encoder
from cxr_cache.errors import ImageError, RunError, StoreIncompleteError, StoreMismatchError
from cxr_cache.models.heads import HeadBank, predict_probabilities
from cxr_cache.models.run import Run, SavedModel
from cxr_cache.models.tuned import as_cached, load_members
from cxr_cache.store.feature_store import DONE, FeatureStore
from cxr_cache.store.rows import FEATURES, find_beside, find_done_rows, prepare_features
from cxr_cache.store.side_by_side import Source
from cxr_cache.store.studies import StudyBatch, average_views

_IMAGES_AT_ONCE, _ROWS_AT_ONCE = 32, 8192
_N_PRINTED = 2  # images whose predictions are shown where a result is printed

logger = logging.getLogger(__name__)

_Pick: TypeAlias = Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64] | None]]
"""Finds the images of some rows, and their slots where the rows are studies."""


def _pick_images(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], None]:
    """Each row is an image."""
    return rows, None


def _split(n_rows: int) -> list[NDArray[np.int64]]:
    """Rows in parts of a batch."""
    return np.array_split(np.arange(n_rows), max(1, -(-n_rows // _IMAGES_AT_ONCE)))


@dataclass(frozen=True)
class Predictions:
    """Probabilities, or scores, of N images or studies; what they mean at the run's thresholds."""

    image_ids: tuple[str, ...]
    """Paths as they were given, or uids of studies."""
    findings: tuple[str, ...]
    probabilities: NDArray[np.float32]
    """Calibrated if the run is, ``(N, F)``; NaN where an image could not be used."""
    decisions: NDArray[np.bool_]
    """``(N, F)``, probability at or above the threshold."""
    errors: tuple[str, ...]
    """Why an image could not be used; empty where it could."""
    views: tuple[str, ...] = ()
    """Of studies: the projections of each one's images, such as ``"Frontal + Lateral"``."""
    undecided: tuple[str, ...] = ()
    """Findings that are ranked only, since too few positives were there to choose a threshold."""
    is_calibrated: bool = True
    """Whether these are probabilities; otherwise they are scores, whose order alone means much."""

    @property
    def row(self) -> str:
        """What has a prediction: ``"image"`` or ``"study"``."""
        return "study" if self.views else "image"

    def __repr__(self) -> str:
        few = slice(_N_PRINTED)
        head = replace(
            self,
            image_ids=self.image_ids[few],
            probabilities=self.probabilities[few],
            decisions=self.decisions[few],
            errors=self.errors[few],
        )
        n_images, n_failed = count(len(self.image_ids), self.row), self.n_failed
        failed = f" ({n_failed:,} could not be used)" if n_failed else ""
        lines = [f"Predictions of {count(len(self.findings), 'finding')} for {n_images}{failed}"]
        lines += head.to_text(n_shown=2).splitlines()
        if len(self.image_ids) > _N_PRINTED:
            lines.append("... to_table() holds all of them.")
        return "\n".join(lines)

    @property
    def n_failed(self) -> int:
        """Images, or studies, without a prediction."""
        return sum(bool(error) for error in self.errors)

    def to_table(self) -> pd.DataFrame:
        """One row per image: image, present (findings, ``;`` between), error, probabilities.

        Of studies the first columns are study and views. A further column too_few_to_decide lists
        the findings that are never decided, if there are any.
        """
        names = np.array(self.findings)
        undecided = ";".join(self.undecided)
        described: pd.DataFrame = pd.DataFrame(
            {
                self.row: self.image_ids,
                **({"views": self.views} if self.views else {}),
                "present": [";".join(names[row]) for row in self.decisions],
                **({"too_few_to_decide": undecided} if undecided else {}),
                "error": self.errors,
            }
        )
        table: pd.DataFrame = pd.concat(
            [described, pd.DataFrame(self.probabilities, columns=list(self.findings))], axis=1
        )
        return table

    def to_text(self, n_shown: int = 5) -> str:
        """The likeliest findings of each image; ``*`` marks those called present.

        ``?`` marks those that nothing is decided of. Scores are written without a per cent sign.
        """
        lines, form = [], "6.1%" if self.is_calibrated else "6.3f"
        for image_id, row, called, error in zip(
            self.image_ids, self.probabilities, self.decisions, self.errors, strict=True
        ):
            lines.append(image_id)
            if error:
                lines.append(f"    not usable: {error}")
                continue
            # Called findings first: with a low threshold they need not be the likeliest.
            for f in sorted(range(len(row)), key=lambda f: (not called[f], -row[f]))[:n_shown]:
                mark = "?" if self.findings[f] in self.undecided else "*" if called[f] else " "
                lines.append(f"  {mark} {row[f]:{form}}  {self.findings[f]}")
        if self.n_failed == len(self.image_ids):
            return "\n".join(lines)
        if self.undecided:
            lines.append(f"? too few to decide, ranked only: {list_names(self.undecided)}.")
        if not self.is_calibrated:
            lines.append("These are scores, not probabilities: the run is not calibrated.")
        lines.append("* at or above the run's threshold. Not for clinical use.")
        return "\n".join(lines)


def predict_images(
    run: Run,
    paths: Sequence[str | Path],
    encoder: Encoder | Sequence[Encoder],
    *,
    studies: str | Path | None = None,
) -> Predictions:
    """Probabilities for image files, or their studies, calibrated as the run says.

    Parameters
    ----------
    run
        A finished run.
    paths
        Image files.
    encoder
        The encoder whose embeddings the run's head was trained on; of a run of several stores, all
        of them in the order of the stores.
    studies
        Of a run of whole studies: the CSV that says which images make a study, as
        :func:`cxr_cache.datasets.studies.read_studies` takes it. A study has no prediction if one
        of its images cannot be used.

    Raises
    ------
    RunError
        `encoder` is another one, or the run was trained on imported embeddings; or `studies` are
        given to a run of single images.
    TableError
        `studies` cannot be read, or lacks an image.

    Examples
    --------
    >>> run = Run.open("runs/first")  # doctest: +SKIP
    >>> encoder = load_encoder(run.config["store"]["encoder"]["name"])  # doctest: +SKIP
    >>> predict_images(run, ["a.png", "b.png"], encoder).to_table()  # doctest: +SKIP
    """
    model = run.load_model()
    encoders = _as_encoders(encoder)
    require_encoders_of_run(run, model, encoders)
    if studies is not None and model.level == "image":
        raise RunError(
            f"{run.path} predicts single images; --studies goes with a run of --level study."
        )
    names = [str(path) for path in paths]
    grouped = None if model.level == "image" else read_studies(studies, names)
    for note in () if grouped is None else grouped.notes:
        logger.warning("%s", note)
    predictor = Predictor(model, encoders)
    preps = [one.preprocessing for one in encoders]
    if unused := find_unused_bits(None, names, preps[0]):
        logger.warning(
            "%s: they seem to be %d-bit images, and the run's own were not, so that they look "
            "nearly black to it; write them with the full range of 16 bits",
            unused[1],
            unused[0],
        )
    pick: _Pick = _pick_images
    ids, of = names, np.arange(len(names))
    if grouped is not None:
        ids, pick, of = grouped.cohort.image_ids.tolist(), grouped.pick, grouped.study_of
    probabilities = np.full((len(ids), len(model.findings)), np.nan, np.float32)
    errors = [""] * len(ids)
    for chosen in _split(len(ids)):
        decoded: dict[int, list[NDArray[np.uint8]]] = {}
        for i in pick(chosen)[0].tolist():
            try:
                decoded[i] = [read_image(None, names[i], prep).pixels for prep in preps]
            except ImageError as error:
                errors[of[i]] = str(error) if grouped is None else f"{names[i]}: {error}"
        usable = chosen[[not errors[k] for k in chosen]]
        if len(usable):
            rows, slots = pick(usable)
            of_encoders = zip(*(decoded[i] for i in rows.tolist()), strict=True)
            pixels = [torch.from_numpy(np.stack(images)) for images in of_encoders]  # own sizes
            probabilities[usable] = predictor.from_pixels(*pixels, slots=slots)
    for row in np.flatnonzero(np.isnan(probabilities).any(axis=1)):
        errors[row] = errors[row] or "the encoder gave NaN or infinity for this image"
    point = model.operating_point
    undecided = np.array(model.findings)[point.undecided]
    calibrated = point.calibration.apply(probabilities)
    return Predictions(
        tuple(ids),
        model.findings,
        calibrated.astype(np.float32),
        calibrated >= point.thresholds,
        tuple(errors),
        tuple(name or "unknown" for name in grouped.cohort.projections.tolist()) if grouped else (),
        tuple(undecided.tolist()),
        point.calibration.method != "none",
    )


def _as_encoders(encoder: Encoder | Sequence[Encoder] | None) -> tuple[Encoder, ...]:
    if encoder is None or isinstance(encoder, Encoder):
        return () if encoder is None else (encoder,)
    return tuple(encoder)


def require_encoders_of_run(run: Run, model: SavedModel, encoders: Sequence[Encoder]) -> None:
    """Raise RunError unless these are the encoders of the run's stores, in their order."""
    if len(encoders) != len(model.encoders):
        raise RunError(
            f"{run.path} reads the features of {count(len(model.encoders), 'encoder')} "
            f"({_name_encoders(model)}), and {len(encoders):,} "
            f"{'is' if len(encoders) == 1 else 'are'} given. Give all of them in this order."
        )
    for recorded, encoder in zip(model.encoders, encoders, strict=True):
        require_encoder_of_run(run, recorded, encoder)


def require_one_encoder(run: Run, model: SavedModel, consequence: str) -> None:
    """Raise RunError with this consequence where a run reads several encoders side by side."""
    if model.further_encoders:
        raise RunError(
            f"{run.path} reads the features of {len(model.encoders)} encoders side by side "
            f"({_name_encoders(model)}); {consequence} Train a run on one of its stores for that."
        )


def _name_encoders(model: SavedModel) -> str:
    return list_names([str(encoder["name"]) for encoder in model.encoders])


def require_encoder_of_run(
    run: Run, trained_with: Mapping[str, Any], encoder: Encoder | None
) -> None:
    """Raise RunError unless `encoder` made the embeddings that the run was trained on."""
    require_not_imported(
        trained_with,
        f"{run.path} was trained on",
        "there is no encoder to run new images through. To score other images, import their "
        f"embeddings into a store, too, and use `cxr-cache evaluate {run.path} --store F.h5`. To "
        "predict from images, to explain them or to export the whole model, use `cxr-cache "
        "extract` on the images and train on that store.",
        RunError,
    )
    if encoder is None:
        return
    require_same_encoder(
        trained_with,
        encoder.identity.to_dict(),
        "in the run",
        f"in {encoder.identity.name}",
        "Its head means nothing on these. Use the run's encoder.",
        problem=f"{run.path} was trained on embeddings of another encoder",
        error=RunError,
    )


class Predictor:
    """A trained model with its weights in place: batches to probabilities, not calibrated.

    Loading takes longer than a batch, so keep one for all batches. The members of an ensemble are
    averaged; a row whose input holds NaN or infinity becomes NaN. `encoder` is the run's, as it is
    before fine-tuning, which it stays; a run of several stores has one for each. Embeddings need
    none.
    """

    def __init__(
        self, model: SavedModel, encoder: Encoder | Sequence[Encoder] | None = None
    ) -> None:
        self.model, self._encoders = model, _as_encoders(encoder)
        self._bank = HeadBank.from_snapshot(model.head_tensors) if model.tail is None else None
        is_tuned = model.tail is not None and self._encoders
        self.members = load_members(model, self._encoders[0]) if is_tuned else []

    @torch.inference_mode()
    def from_pixels(
        self, *pixels: Tensor, slots: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Probabilities ``(B, F)`` of images as :meth:`Encoder.encode` takes them.

        Each encoder has a batch of its own, of the same images in the size that it reads.
        A model of whole studies also needs the study and projection of each image, as
        :meth:`cxr_cache.datasets.studies.Studies.pick` gives them; B is then the studies.
        """
        assert self._encoders, "pixels go through an encoder"
        if self.model.tail is None:
            read = []
            for encoder, batch in zip(self._encoders, pixels, strict=True):
                pooled, embeddings = (part.cpu().numpy() for part in encoder.encode(batch))
                outputs = {"embeddings": embeddings, "pooled": pooled}
                read += [outputs[name] for name in FEATURES[self.model.features]]
            return self.from_embeddings(*read, slots=slots)
        (encoder,), (batch,) = self._encoders, pixels
        tokens = encoder.stem(encoder.prepare(batch), self.model.tail["unfreeze_layers"])
        return self.from_tokens(as_cached(tokens, self.model), slots)

    @torch.inference_mode()
    def from_tokens(
        self, tokens: Tensor, slots: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Probabilities ``(B, F)`` of a fine-tuned model for tokens ``(B, T, W)``.

        `slots` are those of :meth:`from_pixels`.
        """
        assert self.members, "tokens go through fine-tuned blocks of an encoder"
        batch = tokens if slots is None else StudyBatch(tokens, torch.from_numpy(slots))
        mean = torch.stack([torch.sigmoid(member(batch)) for member in self.members]).mean(dim=0)
        finite = mean.isfinite().all(dim=1, keepdim=True)
        probabilities: NDArray[np.float32] = mean.where(finite, torch.nan).cpu().numpy()
        return probabilities

    def from_embeddings(
        self, *outputs: NDArray[np.float32], slots: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Probabilities ``(N, F)`` for encoder-scale outputs ``(N, D)`` that the head reads.

        They come in the order of :data:`cxr_cache.store.rows.FEATURES`, encoder after encoder: most
        often the embeddings alone. `slots` are those of :meth:`from_pixels`.
        """
        assert self._bank is not None, "a fine-tuned model reads tokens"
        n_rows = len(outputs[0])
        n_at_once = _ROWS_AT_ONCE if slots is None else n_rows  # a study stays whole
        averaged = []
        for start in range(0, n_rows, n_at_once):
            parts = [output[start : start + n_at_once] for output in outputs]
            prepared = prepare_features(parts, self.model.head["input_norm"])
            prepared = np.where(np.isfinite(prepared).all(axis=1, keepdims=True), prepared, np.nan)
            read = torch.from_numpy(prepared)
            read = read if slots is None else average_views(read, torch.from_numpy(slots))
            averaged.append(predict_probabilities(self._bank, read).numpy())
        return np.concatenate(averaged)


def predict_store(
    run: Run,
    store: FeatureStore,
    encoder: Encoder | None = None,
    cohort: Cohort | None = None,
    *,
    further: Sequence[FeatureStore] = (),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predictions of a run for the finished rows of a store, and the store's own targets.

    The store may have any findings. A fine-tuned run also needs tokens that enter its blocks, and
    the store's `encoder`. `cohort` describes and labels the store's images otherwise than the store
    does, as a table of the user's own may. A run of several stores needs `further` stores of the
    same images, in the order of the run's.

    Returns
    -------
    predictions
        The columns of the image table and one probability per finding, not calibrated. Of a run of
        whole studies, the rows are those of :attr:`cxr_cache.datasets.studies.Studies.cohort`.
    targets
        Columns image_id and one target per finding of the cohort, whatever the run predicts.

    Raises
    ------
    StoreMismatchError
        The store's embeddings come from another encoder, or there are not as many stores as the run
        was trained on.
    StoreIncompleteError, StoreFormatError
        Rows are pending or damaged; see :func:`cxr_cache.store.rows.find_done_rows`.
    """
    model = run.load_model()
    _require_same_features(run, model, [store, *further])
    rows = find_done_rows(store)
    beside: tuple[Source, ...] = ()
    if further:
        kept, beside, notes = find_beside((store, rows), further, check_labels=cohort is None)
        rows = rows[kept]
        for note in notes:
            logger.warning("%s", note)
    cohort = (store.cohort if cohort is None else cohort).take(rows)
    pick: _Pick = _pick_images
    if model.level == "study":
        studies = group_by_study(cohort)
        cohort, pick = studies.cohort, studies.pick
        for note in studies.notes:
            logger.warning("%s", note)
    if model.tail is None:
        places, slots = pick(np.arange(len(cohort)))
        outputs = (
            one.read_rows(name, of_store[places])[:, 0]
            for one, of_store in ((store, rows), *beside)
            for name in FEATURES[model.features]
        )
        probabilities = Predictor(model).from_embeddings(*outputs, slots=slots)
    else:
        assert encoder is not None, "fine-tuned blocks belong to an encoder"
        require_encoder_of_run(run, model.encoder, encoder)
        probabilities = _predict_cached(model, encoder, store, rows, len(cohort), pick)
    predicted = replace(
        cohort, targets=np.full_like(probabilities, np.nan), findings=model.findings
    )
    return (
        finding_table(predicted, probabilities),
        finding_table(cohort, cohort.targets, ("image_id",)),
    )


def _predict_cached(
    model: SavedModel,
    encoder: Encoder,
    store: FeatureStore,
    rows: NDArray[np.intp],
    n_predicted: int,
    pick: _Pick,
) -> NDArray[np.float32]:
    lacking = rows[store.status[rows] != DONE]
    if len(lacking):
        raise StoreIncompleteError(
            f"{store.path} lacks the tokens of {count(len(lacking), 'image')}, the first is "
            f"{str(store.image_ids[lacking[0]])!r}. Run the `cxr-cache extract --tokens` command "
            "again."
        )
    predictor, parts = Predictor(model, encoder), []
    for chosen in _split(n_predicted):
        places, slots = pick(chosen)
        tokens = store.read_views("tokens", rows[places], np.zeros_like(places))
        parts.append(predictor.from_tokens(as_cached(decode_tokens(tokens), model), slots))
    return np.concatenate(parts)


def _require_same_features(run: Run, model: SavedModel, stores: Sequence[FeatureStore]) -> None:
    if len(stores) != len(model.encoders):
        raise StoreMismatchError(
            f"{run.path} reads the features of {count(len(model.encoders), 'store')} "
            f"({_name_encoders(model)}), and {len(stores):,} "
            f"{'is' if len(stores) == 1 else 'are'} given. Give one of each encoder, in this order."
        )
    for one, recorded in zip(stores, model.encoders, strict=True):
        require_same_encoder(
            one.header.encoder,
            recorded,
            "in the store",
            "in the run",
            "Extract the images with the run's encoder.",
            problem=f"{one.path} holds embeddings of another encoder than {run.path} was trained "
            "on",
        )
    store = stores[0]
    if model.tail is not None:
        needed = {"boundary_block": model.tail["boundary_block"]}
        there = {"boundary_block": store.header.boundary_block}
        if differences := find_differences(there, needed):
            raise StoreMismatchError(
                f"{store.path} has no tokens for the blocks that {run.path} fine-tuned:\n"
                + describe_differences(differences, "in the store", "in the run")
                + "\nAdd them with `cxr-cache extract --tokens --unfreeze-layers "
                f"{model.tail['unfreeze_layers']}`."
            )
