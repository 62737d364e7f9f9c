"""Parts of a store, made by several workers or machines, to one store."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.manifest import mark_written
from cxr_cache.common.wording import count, describe_differences, find_differences
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.encoders.encoding import MIN_COSINE, cosines
from cxr_cache.encoders.identity import compare_encoders
from cxr_cache.errors import ConfigError, StoreIncompleteError, StoreMismatchError
from cxr_cache.store.feature_store import EMBEDDED, FAILED, FeatureStore, RowCounts, require_absent


@dataclass(kw_only=True)
class MergeSummary(RowCounts):
    """What a merge did, and how many rows of the whole are in which state."""

    store_path: Path
    n_parts: int
    n_damaged: int
    """Rows whose bytes did not match their digest; they are pending now."""

    def to_text(self) -> str:
        """Closing lines for a terminal."""
        lines = self.describe(self.store_path, f" of {count(self.n_parts, 'part')}")
        if self.n_damaged:
            lines.append(f"  {self.n_damaged:,} rows were damaged in their part; they are pending")
        if self.n_pending:
            lines.append("  `cxr-cache extract` without --part finishes the pending rows")
        return "\n".join(lines)


def merge(
    part_paths: Sequence[str | Path], store_path: str | Path, *, overwrite: bool = False
) -> MergeSummary:
    """Join all parts of an extraction, in any order given, into one store.

    They were made by ``extract --part 1/N`` ... ``N/N`` from one image table. They are read only;
    nobody may be writing to them. `overwrite` replaces a store that is there already.

    Raises
    ------
    StoreMismatchError
        A part is missing, given twice or none, or was made by another encoder or from another
        image table; the message names the difference and both values.
    ConfigError
        There is a file at `store_path` and `overwrite` is off.
    StoreIncompleteError
        No row of any part holds an embedding.
    StoreBusyError
        A part is still being written.
    """
    store_path = Path(store_path)
    require_absent(store_path, overwrite=overwrite)
    paths = [Path(path).resolve() for path in part_paths]
    if repeated := {path for path in paths if paths.count(path) > 1}:
        raise StoreMismatchError(f"{min(repeated)} is given twice. Give each part once.")
    if store_path.resolve() in paths:
        raise ConfigError(f"{store_path} is one of the parts. Write the whole to another file.")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(FeatureStore.open(path, "r+")) for path in paths]
        parts = _in_order(opened)
        for part in parts[1:]:
            require_same_kind(parts[0], part)
        if not any(len(part.embedded_rows) for part in parts):
            raise StoreIncompleteError(
                f"No row of the {len(parts)} parts holds an embedding, so there is nothing to "
                f"merge. `cxr-cache inspect {paths[0]}` says why; finish the parts with the "
                "`cxr-cache extract --part` commands that began them."
            )
        damaged = [part.find_damaged() for part in parts]
        first = parts[0]
        with FeatureStore.create(
            store_path,
            Cohort(
                pd.concat([part.cohort.images for part in parts]).fillna(""),
                np.concatenate([part.cohort.targets for part in parts]),
                first.findings,
                first.header.cohort,
                first.cohort.reading,
            ),
            encoder=first.header.encoder,
            features=first.feature_shapes,
            canary=first.canary,
            boundary_block=first.header.boundary_block,
            tokens_dtype=first.header.tokens_dtype,
            fill=lambda whole: _copy(whole, parts, damaged),
            overwrite=overwrite,
        ) as whole:
            counts = vars(whole.count_rows())
    mark_written(store_path)
    n_damaged = sum(map(len, damaged))
    return MergeSummary(store_path=store_path, n_parts=len(parts), n_damaged=n_damaged, **counts)


def _in_order(parts: Sequence[FeatureStore]) -> list[FeatureStore]:
    """Sort parts by number, and raise unless each is there exactly once."""
    by_number: dict[int, FeatureStore] = {}
    for part in parts:
        described = part.header.part
        if described is None:
            raise StoreMismatchError(
                f"{part.path} is a whole store and no part. Parts are made by "
                "`cxr-cache extract --part 1/N`."
            )
        if other := by_number.get(described["number"]):
            raise StoreMismatchError(
                f"{other.path} and {part.path} are both part {described['number']} of "
                f"{described['of']}. Give each part once."
            )
        by_number[described["number"]] = part
    if not by_number:
        raise StoreMismatchError("There is no part to merge. Name the stores of all parts.")
    n_parts = max(part.header.part["of"] for part in parts if part.header.part)
    missing = (number for number in range(1, n_parts + 1) if number not in by_number)
    if number := next(missing, None):
        raise StoreMismatchError(
            f"Part {number} of {n_parts} is missing. Give all parts, or make it with "
            f"`cxr-cache extract --part {number}/{n_parts}`."
        )
    return [by_number[number] for number in sorted(by_number)]


def require_same_kind(first: FeatureStore, other: FeatureStore) -> None:
    """Raise unless rows of both may lie in one store, and come from one image table."""
    differences = dict(find_differences(_describe(first), _describe(other)))
    differences |= compare_encoders(first.header.encoder, other.header.encoder)
    if differences:
        raise StoreMismatchError(
            f"{other.path} does not belong to {first.path}:\n"
            + describe_differences(differences, "in the first", "in the other")
            + "\nMerge parts of one extraction, made with the same options."
        )
    if first.canary is None or other.canary is None:
        return
    worst = float(cosines(first.canary, other.canary).min())
    if not worst >= MIN_COSINE:
        raise StoreMismatchError(
            f"{other.path} was made by an encoder that computes something else than that of "
            f"{first.path}: cosine {worst:.6f} on the worst test image, at least {MIN_COSINE} "
            f"expected. Compare the versions: {first.header.versions} and {other.header.versions}."
        )


def _describe(part: FeatureStore) -> dict[str, Any]:
    header = part.header
    return {
        "features": part.feature_shapes,
        "boundary_block": header.boundary_block,
        "tokens_dtype": header.tokens_dtype,
        "findings": header.findings,
        "image table": header.cohort,
        "parts": (header.part or {}).get("of"),
        "rows of the whole": (header.part or {}).get("n_rows_of_whole"),
    }


def _copy(
    whole: FeatureStore, parts: Sequence[FeatureStore], damaged: Sequence[NDArray[np.intp]]
) -> None:
    first_row = 0
    for part, bad in zip(parts, damaged, strict=True):
        rows = np.setdiff1d(np.arange(len(part)), bad)
        copy_part(whole, part, rows, first_row + rows)
        first_row += len(part)


def copy_part(
    whole: FeatureStore, part: FeatureStore, rows: NDArray[np.intp], to_rows: NDArray[np.intp]
) -> None:
    """Commit rows of a part, embedded and failed ones, as rows of the whole, B each."""
    status = part.status[rows]
    embedded, failed = np.isin(status, EMBEDDED), status == FAILED
    whole.copy_rows(part, rows[embedded], to_rows[embedded])
    whole.record_failures(to_rows[failed], part.read_errors(rows[failed]))
