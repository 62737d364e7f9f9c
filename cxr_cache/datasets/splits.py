"""Choice of test rows and folds, with no study, or patient, on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from cxr_cache.common.wording import count, list_names
from cxr_cache.datasets.balanced_draw import MIN_DEMAND, draw_groups, hash_names
from cxr_cache.datasets.cohort import GIVEN, UNITS, Cohort, name_unit
from cxr_cache.errors import ConfigError
from cxr_cache.metrics.scores import number_names

TEST = -1
"""Fold of a test row."""
OUTER_FOLD: Final = "the nested cross-validation, as its outer fold"
"""Who chose the test rows of an outer fold, in words."""


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
        What was kept whole: ``"study"`` (patients, where they are known), or ``"image"``. Of a
        split that was given, this is said of the folds alone.
    whose
        Who chose the test rows, in words; blank where they are new.
    notes
        What was made of a given split, in sentences.
    """

    is_test: NDArray[np.bool_]
    fold: NDArray[np.int64]
    by: Literal["study", "image"] = "study"
    whose: str = ""
    notes: tuple[str, ...] = ()

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


def draw_rows(
    rows: NDArray[np.int64], groups: NDArray[Any], n_images: int, seed: Sequence[int]
) -> NDArray[np.int64]:
    """Draw whole groups at random until about so many of some rows are drawn.

    The groups come in a random order, which depends on the seed alone. As many are taken from its
    beginning as come closest to `n_images`, and at least one. So a smaller draw is part of a
    larger one, and draws from other rows share what these rows have in common.

    Parameters
    ----------
    rows
        Rows to draw from, in ascending order.
    groups
        Patient or study of all N rows, shape ``(N,)``.
    n_images
        Number of rows to come close to.
    seed
        Seed of the order, of one or more numbers.

    Returns
    -------
    NDArray
        The rows drawn, in ascending order.
    """
    _, codes = number_names(groups)
    order = np.random.default_rng(seed).permutation(codes.max() + 1)
    place = order[codes[rows]]
    reached = np.cumsum(np.bincount(place))
    furthest = np.argmin(np.where(reached > 0, np.abs(reached - n_images), np.inf))
    return rows[place <= furthest]


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
    is_test = _new_test(targets, groups, findings, by, test_fraction, seed)
    if by == "image":
        groups = np.arange(len(targets))
    fold = np.full(len(targets), TEST, np.int64)
    fold[~is_test] = assign_folds(targets[~is_test], groups[~is_test], n_folds, seed)
    return Split(is_test, fold, by)


def _new_test(
    targets: NDArray[np.float32],
    groups: NDArray[Any],
    findings: Sequence[str],
    by: Literal["study", "image"],
    test_fraction: float,
    seed: int,
) -> NDArray[np.bool_]:
    if by == "image":
        return split_test_by_image(targets, findings, test_fraction, seed)
    return split_test(targets, groups, test_fraction, seed)


def has_given_split(cohort: Cohort) -> bool:
    """Tell whether any image came with a place in a split, or with a fold."""
    return any((_given(cohort, name) != "").any() for name in GIVEN)


def take_given_split(
    cohort: Cohort,
    *,
    by: Literal["study", "image"] = "study",
    n_folds: int = 5,
    test_fraction: float = 0.2,
    seed: int = 42,
) -> Split:
    """Use the test images and folds that a data set came with, and make what it lacks.

    Images marked val are train images, as the folds take their part; where no image is marked test,
    they are the test images. Folds that are not given are made inside the train images, of whole
    groups. The notes of the split say what was done.

    Parameters
    ----------
    cohort
        With a column ``given_split``, ``given_fold`` or both.
    by, n_folds, test_fraction, seed
        As in :func:`make_split`, for what is not given.

    Raises
    ------
    ConfigError
        No image is left to train on, or there are fewer groups than folds.
    """
    whose = (cohort.reading.split if cohort.reading else "") or "the image table"
    targets, groups = cohort.targets, cohort.groups
    is_test, notes = _take_test(cohort)
    if is_given := is_test is not None:
        if by == "image":
            notes.append("As the test split is given, --split-by image acts on the folds alone.")
    else:
        is_test = _new_test(targets, groups, cohort.findings, by, test_fraction, seed)
    if is_test.all():
        raise ConfigError(
            f"The split given by {whose} has {count(len(cohort), 'test image')} and nothing to "
            "train on. Make another one with --split new."
        )
    rows = np.flatnonzero(~is_test)
    whole = groups[rows] if by == "study" else rows
    of_rows, more = _take_folds(_given(cohort, "given_fold")[rows], groups[rows], n_folds)
    if of_rows is None:
        of_rows = assign_folds(targets[rows], whole, n_folds, seed)
    elif not is_given:
        more.append(f"The folds are those given by {whose}.")
    fold = np.full(len(cohort), TEST, np.int64)
    fold[rows] = of_rows
    notes += more
    if is_given:
        notes += _note_both_sides(cohort, is_test)
    if by == "study":
        notes += _note_several_folds(cohort, rows, of_rows)
    return Split(is_test, fold, by, whose if is_given else "", tuple(notes))


def _given(cohort: Cohort, name: str) -> NDArray[np.str_]:
    """A column of the image table, blank where there is none."""
    cells = cohort.images.get(name)
    return np.full(len(cohort), "") if cells is None else np.asarray(cells.tolist(), np.str_)


def _take_test(cohort: Cohort) -> tuple[NDArray[np.bool_] | None, list[str]]:
    """The given test rows, None where a new test split has to be made, and what was done."""
    words = _given(cohort, "given_split")
    n_val, n_blank = int((words == "val").sum()), int((words == "").sum())
    if not np.isin(words, ("val", "test")).any():
        return None, ["No test images are given, so a new test split was made."]
    if not (words == "test").any():
        is_test, notes = words == "val", []
        notes.append(f"No images are marked test, so the {n_val:,} marked val are the test images.")
    else:
        is_test, notes = words == "test", []
        if n_val:
            notes.append(
                f"{count(n_val, 'image')} marked val {'is' if n_val == 1 else 'are'} trained on: "
                "folds inside train and val take the part of val."
            )
    if n_blank:
        groups, blank = cohort.groups, words == ""
        others = groups[~is_test & ~blank]
        follows = blank & np.isin(groups, groups[is_test]) & ~np.isin(groups, others)
        is_test = is_test | follows
        notes.append(
            f"{count(n_blank, 'image')} {'has' if n_blank == 1 else 'have'} no place in the given "
            f"split: {int(follows.sum()):,} joined the test images, where the same "
            f"{name_unit(cohort.patient_ids)} is, and {n_blank - int(follows.sum()):,} the train "
            "images."
        )
    return is_test, notes


def _take_folds(
    labels: NDArray[np.str_], groups: NDArray[Any], n_folds: int
) -> tuple[NDArray[np.int64] | None, list[str]]:
    """The given folds of train rows, None where they have to be made, and what was done."""
    names = sorted({*labels.tolist()} - {""}, key=lambda name: (len(name), name))
    if not names:
        return None, []
    if len(names) == 1:
        return None, [f"A single fold is given, {names[0]}, so {n_folds} new ones were made."]
    notes = []
    if len(names) != n_folds:
        notes.append(f"{len(names)} folds are given and used, where --folds says {n_folds}.")
    blank = np.flatnonzero(labels == "")
    if len(blank):
        known = labels != ""
        of_group = dict(zip(groups[known].tolist(), labels[known].tolist(), strict=True))
        new = sorted({*groups[blank].tolist()} - of_group.keys())
        of_group |= {group: names[i % len(names)] for i, group in enumerate(new)}
        labels = labels.astype(object)
        labels[blank] = [of_group[group] for group in groups[blank].tolist()]
        notes.append(
            f"{count(len(blank), 'train image')} without a given fold joined the others of their "
            "patient or study, or were dealt out."
        )
    place = {name: k for k, name in enumerate(names)}
    return np.array([place[label] for label in labels.tolist()], np.int64), notes


def _note_both_sides(cohort: Cohort, is_test: NDArray[np.bool_]) -> list[str]:
    """Count and name who is on both sides of a given split."""
    if not (shared := find_shared(is_test, cohort.groups)):
        return []
    n_images = count_shared_studies(is_test, cohort.groups)
    return [
        f"{_count_units(shared, cohort)} on both sides of the given split, with {n_images:,} of "
        f"{count(int(is_test.sum()), 'test image')}: {_name_groups(shared)}. Figures on test are "
        "therefore too good. --split new makes a split that keeps them whole."
    ]


def _note_several_folds(
    cohort: Cohort, rows: NDArray[np.intp], fold: NDArray[np.int64]
) -> list[str]:
    """Count and name who is in several of the given folds."""
    pairs = np.unique(np.stack([cohort.groups[rows], fold.astype(str)]), axis=1)
    names, n_folds = np.unique(pairs[0], return_counts=True)
    if not (several := names[n_folds > 1].tolist()):
        return []
    return [
        f"{_count_units(several, cohort)} in more than one fold: {_name_groups(several)}. The "
        "scores of the folds, and thresholds chosen on them, are therefore too good."
    ]


def _count_units(groups: Sequence[str], cohort: Cohort) -> str:
    unit = name_unit(cohort.patient_ids)
    return f"1 {unit} is" if len(groups) == 1 else f"{len(groups):,} {UNITS[unit]} are"


def _name_groups(groups: Sequence[str]) -> str:
    """The first three, by the names that the table has for them."""
    return list_names([name.removeprefix("patient ").removeprefix("study ") for name in groups], 3)


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
    return _assign_groups(targets, groups, n_folds, seed)


def make_outer_split(
    targets: NDArray[np.float32],
    groups: NDArray[Any],
    tested: int | None,
    *,
    n_outer_folds: int,
    n_folds: int,
    seed: int,
) -> Split:
    """Set one outer fold of a nested cross-validation aside, and divide the others into folds.

    Both are made by :func:`assign_folds`; the outer folds are the same for every `tested`.

    Parameters
    ----------
    targets, groups, n_folds, seed
        As in :func:`make_split`.
    tested
        Outer fold whose rows are the test, from 0; None tests nothing and trains on all rows.
    n_outer_folds
        Number of outer folds.

    Raises
    ------
    ConfigError
        There are fewer groups than folds.
    """
    outer = assign_folds(targets, groups, n_outer_folds, seed)
    is_test = outer == tested if tested is not None else np.zeros(len(outer), np.bool_)
    fold = np.full(len(targets), TEST, np.int64)
    fold[~is_test] = assign_folds(targets[~is_test], groups[~is_test], n_folds, seed)
    if tested is None:
        return Split(is_test, fold)
    whose = f"{OUTER_FOLD} ({tested + 1} of {n_outer_folds})"
    return Split(is_test, fold, whose=whose)


def split_test(
    targets: NDArray[np.float32], groups: NDArray[Any], test_fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Choose whole groups as test rows, with about `test_fraction` of every finding.

    The choice stays put when images are added: a group is drawn by a hash of its name and the seed,
    and what the rest of the data changes is only how high a draw may be; see
    :func:`cxr_cache.datasets.balanced_draw.draw_groups`. Every group with a finding is in test as
    often as the others, over many seeds, as far as balance allows. Where two groups or more have
    positives of a finding, or negatives, test and train get one at least, if that can be.

    Parameters are those of :func:`assign_folds`.

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
    names, group_of_row = number_names(groups)
    _require_groups(len(names), 2, "parts (test and train)")
    counts, n_negative = (
        _count_images(targets == value, group_of_row, len(names)) for value in (1, 0)
    )  # (G, F + 1) each
    classes = np.concatenate([counts[:, :-1], n_negative[:, :-1]], axis=1) > 0
    is_test = draw_groups(counts, classes, hash_names(names, seed), test_fraction)
    return np.asarray(is_test[group_of_row])


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
    """Count test images that have another image of the same study, or other group, in train."""
    return int(np.isin(study_uids[is_test], study_uids[~is_test]).sum())


def find_shared(is_test: NDArray[np.bool_], groups: NDArray[Any]) -> list[str]:
    """Name the groups that have images both in test and in train, in order."""
    return [str(name) for name in np.intersect1d(groups[is_test], groups[~is_test])]


def _assign_groups(
    targets: NDArray[np.float32], groups: NDArray[Any], n_parts: int, seed: int
) -> NDArray[np.int64]:
    """Put every group into one of S parts, so that each part gets as much of every finding.

    For a finding, let c be the number of a group's images that have it, E the number of such images
    that a part shall get, and R the number that the part still lacks. The group goes to the part
    where Pearson's chi-square, the sum of R^2 / E over findings, falls most. It falls by

        (R^2 - (R - c)^2) / E = c (2 R - c) / E

    All images are counted as one more finding, which gives the parts their right sizes. Groups that
    hold a large part of a rare finding come first, while every part still has room for them. As in
    :mod:`cxr_cache.datasets.balanced_draw`, E is ten groups' images at least.
    """
    names, group_of_row = number_names(groups)
    _require_groups(len(names), n_parts, "folds")
    counts = _count_images(targets == 1, group_of_row, len(names))  # (G, F + 1)
    totals = counts.sum(axis=0)
    weighted = counts / np.maximum(totals / n_parts, MIN_DEMAND * counts[:, -1].mean())  # c / E
    squares = (weighted * counts).sum(axis=1)  # (G,)

    # Without jitter, the rare findings would fall on the same side for every seed.
    rng = np.random.default_rng(seed)
    jitter = rng.uniform(0.75, 1.0, len(counts))
    order = np.argsort(-(counts / totals).sum(axis=1) * jitter)

    lacking = np.tile(totals / n_parts, (n_parts, 1))  # R, (S, F + 1)
    part_of_group = np.full(len(counts), -1, np.int64)
    is_empty = np.ones(n_parts, np.bool_)
    for n_left, group in zip(range(len(order), 0, -1), order, strict=True):
        gains = 2 * (lacking @ weighted[group]) - squares[group]  # (S,)
        gains = gains.round(9)  # keeps ties equal on every processor
        if n_left <= is_empty.sum():
            gains[~is_empty] = -np.inf
        part = gains.argmax()
        part_of_group[group] = part
        lacking[part] -= counts[group]
        is_empty[part] = False
    # The rarest groups come first and go to the first parts, so their numbers are dealt out anew.
    return rng.permutation(n_parts)[part_of_group[group_of_row]]


def _require_groups(n_groups: int, n_parts: int, parts: str) -> None:
    if n_groups < n_parts:
        raise ConfigError(
            f"{n_parts} {parts} need as many groups (patients or studies), "
            f"but there are only {n_groups}. Use fewer folds, or more data."
        )


def _count_images(
    cells: NDArray[np.bool_], group_of_row: NDArray[np.int64], n_groups: int
) -> NDArray[np.float64]:
    """Count each group's images with each cell that is true at all, and last all its images."""
    columns = [of_finding.astype(np.float64) for of_finding in cells.T]
    columns.append(np.ones(len(cells)))
    counts = np.stack(
        [np.bincount(group_of_row, column, minlength=n_groups) for column in columns], axis=1
    )
    return np.asarray(counts[:, counts.any(axis=0)], np.float64)


def _require_fraction(test_fraction: float) -> None:
    if not 0 < test_fraction < 1:
        raise ConfigError(f"the test fraction lies between 0 and 1, not at {test_fraction}")
