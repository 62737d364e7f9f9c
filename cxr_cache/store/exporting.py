"""Features of a store to a file that other programs read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.files import replacing
from cxr_cache.common.tables import write_table
from cxr_cache.common.wording import count
from cxr_cache.config import Features, TrainConfig
from cxr_cache.errors import ConfigError
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import FEATURES, find_done_rows, read_features, require_features


def export_features(
    store: FeatureStore, path: str | Path, *, features: Features = TrainConfig.features
) -> str:
    """Write the features of every finished image, with what is known of the image.

    Parameters
    ----------
    store
        An open store. Rows that failed or are pending are left out, and the result counts them.
    path
        File to write or replace. Its ending says how: ``.npz`` holds ``image_id``, ``study_uid``,
        ``patient_id`` ``(N,)``, ``embeddings`` ``(N, D)`` float32, ``targets`` ``(N, F)``,
        ``findings`` ``(F,)``, and can be read back by ``cxr-cache import``; ``.csv`` and
        ``.parquet`` hold the table that :meth:`FeatureStore.to_frame` gives.
    features
        ``"projected"``, ``"pooled"`` or ``"both"``, as a head may read them; not normalised.

    Returns
    -------
    str
        What was written, in a sentence.

    Raises
    ------
    ConfigError
        The ending is another one, or the library for Parquet is not installed.
    StoreIncompleteError, StoreFormatError
        No row is finished, a row is damaged, or the store lacks these features.

    Examples
    --------
    >>> with FeatureStore.open("features.h5") as store:  # doctest: +SKIP
    ...     export_features(store, "features.npz")
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ConfigError(
            f"{path} ends in {path.suffix or 'nothing'}; end it in {', '.join(_WRITERS)}, which "
            "says how the features are written."
        )
    config = TrainConfig(features=features, input_norm="none", flip=False)
    require_features(store, config)
    rows = find_done_rows(store, allow_pending=True)
    _WRITERS[path.suffix](store, rows, config, path)
    left_out = len(store) - len(rows)
    return f"{path}: features of {count(len(rows), 'image')}" + (
        f"; {left_out:,} of {len(store):,} failed or are pending, and are left out" * bool(left_out)
    )


def _write_npz(
    store: FeatureStore, rows: NDArray[np.intp], config: TrainConfig, path: Path
) -> None:
    cohort = store.cohort.take(rows)
    with replacing(path) as file:
        np.savez(
            file,
            allow_pickle=False,
            image_id=cohort.image_ids,
            study_uid=cohort.study_uids,
            patient_id=cohort.patient_ids,
            embeddings=read_features(store, rows, config)[0],
            targets=cohort.targets,
            findings=np.array(cohort.findings, np.str_),
        )


def _write_csv(
    store: FeatureStore, rows: NDArray[np.intp], config: TrainConfig, path: Path
) -> None:
    write_table(path, _frame(store, rows, config))


def _write_parquet(
    store: FeatureStore, rows: NDArray[np.intp], config: TrainConfig, path: Path
) -> None:
    with replacing(path) as file:
        try:
            _frame(store, rows, config).to_parquet(file, index=False)
        except ImportError as error:
            raise ConfigError(
                f"{path} needs a library for Parquet: pip install pyarrow. Or write .npz or .csv."
            ) from error


def _frame(store: FeatureStore, rows: NDArray[np.intp], config: TrainConfig) -> pd.DataFrame:
    frame = store.to_frame(FEATURES[config.features]).iloc[rows]
    kept: pd.DataFrame = frame.drop(columns=["status", "error"])
    return kept


_WRITERS: Final[dict[str, Callable[[FeatureStore, NDArray[np.intp], TrainConfig, Path], None]]] = {
    ".npz": _write_npz,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
