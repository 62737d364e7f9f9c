"""Choice of test rows and folds, with no study, or patient, on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cxr_cache.errors import ConfigError

TEST = -1
"""Fold of a test row."""


@dataclass(frozen=True, eq=False)
class Split:
    """Assignment of rows to the test split and to folds.

    Attributes
    ----------
    is_test
        True for test rows, shape ``(N,)``.
    fold
        Fold that holds the row out, 0 to K - 1, and -1 for test rows; shape ``(N,)``, int64.
    by
        What was kept whole: ``"study"`` (patients, where they are known), or ``"image"``.
    """

    is_test: NDArray[np.bool_]
    fold: NDArray[np.int64]
    by: Literal["study", "image"] = "study"

    def __post_init__(self) -> None:
        assert np.array_equal(self.is_test, self.fold == TEST), "test rows, and only they, have -1"

    def __len__(self) -> int:
        return len(self.fold)

    @property
    def n_folds(self) -> int:
        """The number of folds, K."""
        return int(self.fold.max()) + 1

    def held_out(self, fold: int) -> NDArray[np.int64]:
        """Return the rows that the model of `fold` is scored on."""
        return np.flatnonzero(self.fold == fold)

    def trained_on(self, fold: int) -> NDArray[np.int64]:
        """Return the rows that the model of `fold` learns from: neither test nor held out."""
        return np.flatnonzero(~self.is_test & (self.fold != fold))


def make_split(
    targets: NDArray[np.float32],
    groups: NDArray[Any],
    findings: Sequence[str],
    *,
    by: Literal["study", "image"] = "study",
    n_folds: int = 5,
    test_fraction: float = 0.2,
    seed: int = 42,
) -> Split:
    """Set the test rows aside, then divide the others into folds.

    Parameters
    ----------
    targets
        Shape ``(N, F)``: 1 present, 0 absent, NaN unlabelled. Unlabelled rows are placed too.
    groups
        Patient or study of each row, shape ``(N,)``.
    findings
        Names of the F findings.
    by
        ``"study"`` keeps every group whole. ``"image"`` ignores `groups` and reproduces the test
        rows of the reference system, where most test images have another image of their study in
        train. The reference does not document its folds; here :func:`assign_folds` chooses them.
    n_folds, test_fraction, seed
        The number of folds K, the share of test images, and the seed of the choice.

    Raises
    ------
    ConfigError
        An option is out of range, or there are fewer groups than parts.
    """
    if by == "image":
        groups = np.arange(len(targets))
        is_test = split_test_by_image(targets, findings, test_fraction, seed)
    else:
        is_test = split_test(targets, groups, test_fraction, seed)
    fold = np.full(len(targets), TEST, np.int64)
    fold[~is_test] = assign_folds(targets[~is_test], groups[~is_test], n_folds, seed)
    return Split(is_test, fold, by)


def assign_folds(
    targets: NDArray[np.float32], groups: NDArray[Any], n_folds: int, seed: int
) -> NDArray[np.int64]:
    """Divide rows into folds of whole groups, with every finding spread evenly.

    No fold is empty, and the same arguments give the same folds.

    Parameters
    ----------
    targets
        Shape ``(N, F)``; only ones are counted, and NaN is treated like 0.
    groups
        Patient or study of each row, shape ``(N,)``.
    n_folds
        K, at least 2.
    seed
        Another seed gives other folds, balanced equally well.

    Returns
    -------
    NDArray[np.int64]
        Fold of each row, 0 to K - 1, shape ``(N,)``.

    Raises
    ------
    ConfigError
        There are fewer groups than folds.

    Examples
    --------
    >>> targets = np.eye(2, dtype=np.float32).repeat(4, axis=0)  # two findings, four images each
    >>> studies = np.array(["a", "a", "b", "b", "c", "c", "d", "d"])
    >>> folds = assign_folds(targets, studies, n_folds=2, seed=0)
    >>> [targets[folds == fold].sum(axis=0).tolist() for fold in (0, 1)]
    [[2.0, 2.0], [2.0, 2.0]]
    """
    if n_folds < 2:
        raise ConfigError(f"cross-validation needs at least 2 folds, not {n_folds}")
    return _assign_groups(targets, groups, np.full(n_folds, 1 / n_folds), seed, "folds")


def split_test(
    targets: NDArray[np.float32], groups: NDArray[Any], test_fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Choose whole groups as test rows, with about `test_fraction` of every finding.

    Parameters and balance are those of :func:`assign_folds`.

    Returns
    -------
    NDArray[np.bool_]
        True for test rows, shape ``(N,)``; both sides have at least one group.

    Raises
    ------
    ConfigError
        `test_fraction` is not between 0 and 1, or there is a single group.
    """
    _require_fraction(test_fraction)
    shares = np.array([test_fraction, 1 - test_fraction])
    part = _assign_groups(targets, groups, shares, seed, "parts (test and train)")
    return np.asarray(part == 0)


def split_test_by_image(
    targets: NDArray[np.float32],
    findings: Sequence[str],
    test_fraction: float = 0.2,
    seed: int = 42,
) -> NDArray[np.bool_]:
    """Choose test rows image by image, as the reference system does.

    This is scikit-learn's ``train_test_split`` stratified by the first label, which is the first of
    `findings` that is present. It gives 1,494 test images on the complete Indiana tables. Images of
    one study fall on both sides; see :func:`count_shared_studies`. scikit-learn refuses a first
    label that occurs once, so such a label (there is none in the Indiana tables) joins the most
    frequent one.

    Parameters
    ----------
    targets
        Shape ``(N, F)``.
    findings
        F names; strata are sorted by name, so the rows depend on them.
    test_fraction, seed
        scikit-learn's ``test_size`` and ``random_state``.

    Returns
    -------
    NDArray[np.bool_]
        True for test rows, shape ``(N,)``.

    Raises
    ------
    ConfigError
        There are too few images for so many first labels.
    """
    from sklearn.model_selection import train_test_split  # takes a second to import, for few runs

    _require_fraction(test_fraction)
    present = targets == 1
    first_labels = np.asarray(findings)[present.argmax(axis=1)]  # (N,)
    first_labels = np.where(present.any(axis=1), first_labels, "")
    labels, counts = np.unique(first_labels, return_counts=True)
    is_single = np.isin(first_labels, labels[counts == 1])
    strata = np.where(is_single, labels[counts.argmax()], first_labels)
    try:
        _, test_rows = train_test_split(
            np.arange(len(targets)), test_size=test_fraction, random_state=seed, stratify=strata
        )
    except ValueError as error:
        raise ConfigError(
            f"{len(targets)} images with {len(labels)} first labels cannot be split by image: "
            f"{error} Split by study instead."
        ) from error
    is_test = np.zeros(len(targets), np.bool_)
    is_test[test_rows] = True
    return is_test


def count_shared_studies(is_test: NDArray[np.bool_], study_uids: NDArray[Any]) -> int:
    """Count test images that have another image of the same study in train."""
    return int(np.isin(study_uids[is_test], study_uids[~is_test]).sum())


def _assign_groups(
    targets: NDArray[np.float32], groups: NDArray[Any], shares: ArrayLike, seed: int, parts: str
) -> NDArray[np.int64]:
    """Put every group into one of S parts, so that each part gets its share of every finding.

    For a finding, let c be the number of a group's images that have it, E the number of such images
    that a part shall get, and R the number that the part still lacks. The group goes to the part
    where Pearson's chi-square, the sum of R^2 / E over findings, falls most. It falls by

        (R^2 - (R - c)^2) / E = c (2 R - c) / E

    All images are counted as one more finding, which gives the parts their right sizes. Groups that
    hold a large part of a rare finding come first, while every part still has room for them.
    """
    group_names, group_of_row = np.unique(groups, return_inverse=True)
    shares = np.asarray(shares)  # (S,)
    if len(group_names) < len(shares):
        raise ConfigError(
            f"{len(shares)} {parts} need as many groups (patients or studies), "
            f"but there are only {len(group_names)}. Use fewer folds, or more data."
        )
    counts = _count_positives(targets, group_of_row, len(group_names))  # (G, F + 1)
    totals = counts.sum(axis=0)
    weighted = counts / totals  # c / total, where E is share * total
    squares = (weighted * counts).sum(axis=1)  # (G,)

    # Without jitter, the rare findings would fall on the same side for every seed.
    jitter = np.random.default_rng(seed).uniform(0.75, 1.0, len(counts))
    order = np.argsort(-weighted.sum(axis=1) * jitter)

    lacking = shares[:, None] * totals  # R, (S, F + 1)
    part_of_group = np.full(len(counts), -1, np.int64)
    is_empty = np.ones(len(shares), np.bool_)
    for n_left, group in zip(range(len(order), 0, -1), order, strict=True):
        gains = (2 * (lacking @ weighted[group]) - squares[group]) / shares  # (S,)
        gains = gains.round(9)  # keeps ties equal on every processor
        if n_left <= is_empty.sum():
            gains[~is_empty] = -np.inf
        part = gains.argmax()
        part_of_group[group] = part
        lacking[part] -= counts[group]
        is_empty[part] = False
    return part_of_group[group_of_row]


def _count_positives(
    targets: NDArray[np.float32], group_of_row: NDArray[np.int64], n_groups: int
) -> NDArray[np.float64]:
    """Count each group's images with each finding that occurs at all, and last all its images."""
    columns = [(targets[:, f] == 1).astype(np.float64) for f in range(targets.shape[1])]
    columns.append(np.ones(len(targets)))
    counts = np.stack(
        [np.bincount(group_of_row, column, minlength=n_groups) for column in columns], axis=1
    )
    return np.asarray(counts[:, counts.any(axis=0)], np.float64)


def _require_fraction(test_fraction: float) -> None:
    if not 0 < test_fraction < 1:
        raise ConfigError(f"the test fraction lies between 0 and 1, not at {test_fraction}")
