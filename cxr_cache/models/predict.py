"""A run and new images, or another store, to probabilities."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from joblib import cpu_count
from numpy.typing import NDArray
from torch import Tensor

from cxr_cache.common.files import WriterLock
from cxr_cache.common.wording import count, describe_differences, find_differences, list_names
from cxr_cache.datasets.cohort import Cohort, finding_table
from cxr_cache.datasets.images import find_unused_bits, read_image
from cxr_cache.datasets.raster.png import leave_to_pillow
from cxr_cache.datasets.studies import group_by_study, read_studies
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.encoding import decode_tokens
from cxr_cache.encoders.identity import require_not_imported, require_same_encoder
from cxr_cache.errors import (
    ImageError,
    JobStopped,
    RunError,
    StoreIncompleteError,
    StoreMismatchError,
)
from cxr_cache.models.heads import HeadBank, predict_probabilities
from cxr_cache.models.predictions import (
    Journal,
    Pick,
    Predictions,
    Rows,
    require_writable_as_predictions,
)
from cxr_cache.models.run import Run, SavedModel
from cxr_cache.models.tuned import as_cached, load_members
from cxr_cache.models.unlikeness import TrainingDistribution
from cxr_cache.store.feature_store import DONE, FeatureStore
from cxr_cache.store.rows import FEATURES, find_beside, find_done_rows, prepare_features
from cxr_cache.store.side_by_side import Source
from cxr_cache.store.studies import StudyBatch, average_views

_IMAGES_AT_ONCE, _ROWS_AT_ONCE = 32, 8192

logger = logging.getLogger(__name__)


def _pick_images(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], None]:
    """Each row is an image."""
    return rows, None


def _split(n_rows: int) -> list[NDArray[np.int64]]:
    """Rows in parts of a batch."""
    return np.array_split(np.arange(n_rows), max(1, -(-n_rows // _IMAGES_AT_ONCE)))


def predict_images(
    run: Run,
    paths: Sequence[str | Path],
    encoder: Encoder | Sequence[Encoder],
    *,
    studies: str | Path | None = None,
    partial: str | Path | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Predictions:
    """Probabilities for image files, or their studies, calibrated as the run says.

    Parameters
    ----------
    run
        A finished run, or a folder of ``export_run(..., "hub")``.
    paths
        Image files.
    encoder
        The encoder whose embeddings the run's head was trained on; of a run of several stores, all
        of them in the order of the stores.
    studies
        Of a run of whole studies: the CSV that says which images make a study, as
        :func:`cxr_cache.datasets.studies.read_studies` takes it. A study has no prediction if one
        of its images cannot be used.
    partial
        File that keeps what is finished, batch by batch: the same call goes on from there.
        Predictions of files that have changed since, and of another model, are made anew. The
        file is left to be removed; :func:`predict_to_file` sees to all of that.
    on_progress
        Called with (rows done, rows in all).

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
    _warn_of_unused_bits(names, encoders)
    ids = names
    pick: Pick = _pick_images
    if grouped is not None:
        ids, pick = grouped.cohort.image_ids.tolist(), grouped.pick
    found = Rows(ids, names, pick, len(model.findings))
    distribution = run.load_distribution()
    with Journal.opened(partial, run, found) as journal, ExitStack() as stack:
        journal.fill(found)
        todo = np.flatnonzero(~found.is_done)
        on_progress(len(ids) - len(todo), len(ids))
        predictor = Predictor(model, encoders)
        # As the store was computed. Fine-tuned blocks share weights, in a precision of their own.
        for one in encoders if model.tail is None else ():
            stack.enter_context(one.cast_weights())
        for rows, decoded in _decode_ahead(found, todo, encoders):
            _predict_rows(found, rows, decoded, predictor, distribution)
            journal.add(found, rows)
            on_progress(int(found.is_done.sum()), len(ids))
    views = grouped.cohort.projections.tolist() if grouped else ()
    return _interpret(run, model, found, distribution, views)


def _warn_of_unused_bits(names: Sequence[str], encoders: Sequence[Encoder]) -> None:
    if unused := find_unused_bits(None, names, encoders[0].preprocessing):
        logger.warning(
            "%s: they seem to be %d-bit images, and the run's own were not, so that they look "
            "nearly black to it; write them with the full range of 16 bits",
            unused[1],
            unused[0],
        )


_Decoded: TypeAlias = "list[NDArray[np.uint8]] | str"
"""An image's pixels for each encoder, or why it cannot be used."""


def _decode(name: str, encoders: Sequence[Encoder]) -> _Decoded:
    try:
        return [read_image(None, name, one.preprocessing).pixels for one in encoders]
    except ImageError as error:
        return str(error)


def _decode_ahead(
    found: Rows, todo: NDArray[np.intp], encoders: Sequence[Encoder]
) -> Iterator[tuple[NDArray[np.intp], dict[int, _Decoded]]]:
    """Rows batch by batch with their images, the next ones being read meanwhile, on all cores."""
    with ThreadPoolExecutor(cpu_count(), initializer=leave_to_pillow) as pool:

        def submit(rows: NDArray[np.intp]) -> dict[int, Future[_Decoded]]:
            images = found.pick(rows)[0].tolist()
            return {i: pool.submit(_decode, found.names[i], encoders) for i in images}

        batches = [todo[part] for part in _split(len(todo))] if len(todo) else []
        ahead = submit(batches[0]) if batches else {}
        try:
            for k, rows in enumerate(batches):
                now, ahead = ahead, submit(batches[k + 1]) if k + 1 < len(batches) else {}
                yield rows, {i: future.result() for i, future in now.items()}
        finally:
            pool.shutdown(cancel_futures=True)


def _predict_rows(
    found: Rows,
    rows: NDArray[np.intp],
    decoded: Mapping[int, _Decoded],
    predictor: Predictor,
    distribution: TrainingDistribution | None,
) -> None:
    """Predict a batch, and put into `found` what came of it."""
    found.is_done[rows] = True
    for row in rows.tolist():
        for i in found.images_of[row]:
            if isinstance(reason := decoded[i], str):
                is_image = found.ids[row] == found.names[i]
                found.errors[row] = reason if is_image else f"{found.names[i]}: {reason}"
    usable = rows[[not found.errors[row] for row in rows]]
    if not len(usable):
        return
    images, slots = found.pick(usable)
    of_encoders = zip(*(decoded[i] for i in images.tolist()), strict=True)
    pixels = [torch.from_numpy(np.stack(of_one)) for of_one in of_encoders]  # each in its size
    if distribution is None:
        found.probabilities[usable] = predictor.from_pixels(*pixels, slots=slots)
    else:
        found.probabilities[usable], features = predictor.read_pixels(*pixels, slots=slots)
        found.distances[usable] = distribution.distances(features)
    for row in usable[np.isnan(found.probabilities[usable]).any(axis=1)].tolist():
        found.errors[row] = "the encoder gave NaN or infinity for this image"


def _interpret(
    run: Run,
    model: SavedModel,
    found: Rows,
    distribution: TrainingDistribution | None,
    views: Sequence[str],
) -> Predictions:
    """What the probabilities mean at the run's calibration and thresholds."""
    point, names = model.operating_point, np.array(model.findings)
    is_unlearnt = np.isin(names, run.config.get("findings_unlearnt", []))
    calibrated = point.calibration.apply(found.probabilities)
    return Predictions(
        tuple(found.ids),
        model.findings,
        calibrated.astype(np.float32),
        (calibrated >= point.thresholds) & ~is_unlearnt,
        tuple(found.errors),
        tuple(name or "unknown" for name in views),
        tuple(names[np.asarray(point.undecided) & ~is_unlearnt].tolist()),
        point.calibration.method != "none",
        unknown=tuple(names[is_unlearnt].tolist()),
        distances=found.distances,
        distance_quantiles=np.full(len(found.ids), np.nan)
        if distribution is None
        else distribution.quantiles_of(found.distances),
    )


def predict_to_file(
    run: Run,
    paths: Sequence[str | Path],
    encoder: Encoder | Sequence[Encoder],
    out: str | Path,
    *,
    studies: str | Path | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Predictions:
    """Write predictions of any number of images; after an interruption, the same call continues.

    What is finished is kept in ``OUT.partial`` until `out` is written whole.

    Parameters
    ----------
    run, paths, encoder, studies, on_progress
        As in :func:`predict_images`.
    out
        File whose ending says how it is written; see :meth:`Predictions.write`.

    Raises
    ------
    ConfigError
        The ending of `out` is another one, or the library for Parquet is missing.
    StoreBusyError
        Another process is writing the same file.
    JobStopped
        Ctrl-C; the message says what is kept.
    RunError, TableError, DiskError
        As :func:`predict_images`; and the disk failed: what was finished is kept.
    """
    out = Path(out)
    require_writable_as_predictions(out)
    if out.is_relative_to("/dev"):
        predictions = predict_images(run, paths, encoder, studies=studies, on_progress=on_progress)
        predictions.write(out)
        return predictions
    partial = out.with_name(f"{out.name}.partial")
    lock = WriterLock.acquire(out)
    try:
        predictions = predict_images(
            *(run, paths, encoder), studies=studies, partial=partial, on_progress=on_progress
        )
        predictions.write(out)
        partial.unlink(missing_ok=True)
    except KeyboardInterrupt as stop:
        raise JobStopped(
            f"What was finished is kept in {partial}; the same command continues."
        ) from stop
    finally:
        lock.release()
    return predictions


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
        if self.model.tail is None:
            return self._apply_heads(self._encode(pixels, slots))
        return self.from_tokens(as_cached(self._stem(pixels), self.model), slots)

    @torch.inference_mode()
    def read_pixels(
        self, *pixels: Tensor, slots: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The same, and what a head on the frozen encoder reads of them, ``(B, D)``.

        Of a fine-tuned model, too, the features are those of the encoder before fine-tuning, in
        which :class:`cxr_cache.models.unlikeness.TrainingDistribution` describes training images.
        """
        if self.model.tail is None:
            read = self._encode(pixels, slots)
            return self._apply_heads(read), read
        tokens = self._stem(pixels)
        probabilities = self.from_tokens(as_cached(tokens, self.model), slots)
        (encoder,) = self._encoders
        frozen = encoder.tail(tokens, self.model.tail["unfreeze_layers"])[1].float().cpu().numpy()
        unit = torch.from_numpy(prepare_features([frozen], "l2"))
        unit = unit if slots is None else average_views(unit, torch.from_numpy(slots))
        return probabilities, unit.numpy()

    def _encode(
        self, pixels: Sequence[Tensor], slots: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        """What the heads of a run on frozen encoders read, ``(B, D)``."""
        assert self._encoders, "pixels go through an encoder"
        outputs = []
        for encoder, batch in zip(self._encoders, pixels, strict=True):
            pooled, embeddings = (part.cpu().numpy() for part in encoder.encode(batch))
            of_encoder = {"embeddings": embeddings, "pooled": pooled}
            outputs += [of_encoder[name] for name in FEATURES[self.model.features]]
        return self._prepare(outputs, slots)

    def _stem(self, pixels: Sequence[Tensor]) -> Tensor:
        """Tokens in front of the blocks that were fine-tuned, not yet in the cache's format."""
        assert self.model.tail is not None, "heads read embeddings"
        (encoder,), (batch,) = self._encoders, pixels
        return encoder.stem(encoder.prepare(batch), self.model.tail["unfreeze_layers"])

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
        n_rows = len(outputs[0])
        n_at_once = _ROWS_AT_ONCE if slots is None else n_rows  # a study stays whole
        parts = [
            self._apply_heads(
                self._prepare([output[start : start + n_at_once] for output in outputs], slots)
            )
            for start in range(0, n_rows, n_at_once)
        ]
        return np.concatenate(parts)

    def _prepare(
        self, outputs: Sequence[NDArray[np.float32]], slots: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        """What the head reads of some images, or of the studies that they make."""
        prepared = prepare_features(outputs, self.model.head["input_norm"])
        prepared = np.where(np.isfinite(prepared).all(axis=1, keepdims=True), prepared, np.nan)
        if slots is None:
            return prepared
        return average_views(torch.from_numpy(prepared), torch.from_numpy(slots)).numpy()

    def _apply_heads(self, read: NDArray[np.float32]) -> NDArray[np.float32]:
        assert self._bank is not None, "a fine-tuned model reads tokens"
        return predict_probabilities(self._bank, torch.from_numpy(read)).numpy()


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
    pick: Pick = _pick_images
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
    pick: Pick,
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
