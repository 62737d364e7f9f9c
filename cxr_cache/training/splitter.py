"""Folds of whole groups with every finding spread evenly, as scikit-learn asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import BaseCrossValidator
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import type_of_target

from cxr_cache.datasets.splits import assign_folds
from cxr_cache.errors import ConfigError


class GroupedMultilabelSplit(BaseCrossValidator):  # type: ignore[misc]  # has no types
    """K folds of whole patients or studies, in which every finding is spread evenly.

    A cross-validator for ``cross_val_score``, ``GridSearchCV`` and their like. The rule is that of
    :func:`cxr_cache.datasets.splits.assign_folds`, which ``cxr-cache train`` uses: with a seed as
    `random_state`, the same rows give the same folds in both.

    Parameters
    ----------
    n_splits
        K, at least 2.
    random_state
        A seed gives the same folds on every call, as a comparison of models needs it. None, or a
        generator, gives others each time.

    Examples
    --------
    >>> targets = np.eye(2, dtype=np.float32).repeat(4, axis=0)  # two findings, four images each
    >>> studies = np.array(["a", "a", "b", "b", "c", "c", "d", "d"])
    >>> split = GroupedMultilabelSplit(n_splits=2, random_state=0)
    >>> for train, test in split.split(targets, targets, studies):
    ...     print(studies[train], studies[test])
    ['b' 'b' 'd' 'd'] ['a' 'a' 'c' 'c']
    ['a' 'a' 'c' 'c'] ['b' 'b' 'd' 'd']
    """

    # How scikit-learn's own splitters ask for groups where metadata is routed to them.
    __metadata_request__split = {"groups": True}  # noqa: RUF012

    def __init__(
        self, n_splits: int = 5, random_state: int | np.random.RandomState | None = None
    ) -> None:
        self.n_splits = n_splits
        self.random_state = random_state

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        """K; the arguments are there for scikit-learn and not looked at."""
        return self.n_splits

    def split(
        self, X: Any, y: ArrayLike | None = None, groups: ArrayLike | None = None
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Rows to train on and rows to test on, K times.

        Parameters
        ----------
        X
            Only its length counts, N.
        y
            ``(N, F)``: 1 present, 0 absent, NaN unlabelled; or N class labels, whose classes are
            spread as findings are.
        groups
            Patient or study of each row, ``(N,)``.

        Yields
        ------
        train, test
            Row numbers; no group has rows in both.

        Raises
        ------
        ConfigError
            `y` or `groups` is missing, there are fewer groups than folds, or K is less than 2.
        """
        yield from super().split(X, y, groups)

    def _iter_test_masks(
        self, X: Any = None, y: Any = None, groups: Any = None
    ) -> Iterator[NDArray[np.bool_]]:
        if groups is None:
            raise ConfigError(
                "GroupedMultilabelSplit needs groups: the patient or study of each row, as in "
                "split(X, y, groups) or cross_val_score(..., groups=...). Where every row stands "
                "for itself, pass np.arange(len(X))."
            )
        fold = assign_folds(_as_targets(y), np.asarray(groups), self.n_splits, self._seed())
        for k in range(self.n_splits):
            yield fold == k

    def _seed(self) -> int:
        if isinstance(self.random_state, int | np.integer):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))


def _as_targets(y: ArrayLike | None) -> NDArray[Any]:
    """Targets ``(N, F)`` as they are; of class labels, one column per class."""
    if y is None:
        raise ConfigError("GroupedMultilabelSplit needs y: what it spreads evenly over the folds.")
    if isinstance(y, pd.DataFrame):  # its columns may have a missing value that is not NaN
        return y.to_numpy(np.float64, na_value=np.nan)
    values = np.asarray(y)
    if values.ndim == 2:
        return values
    if (kind := type_of_target(values)) not in ("binary", "multiclass"):
        raise ConfigError(
            f"GroupedMultilabelSplit spreads findings, (N, F), or class labels, (N,), and not a y "
            f"of shape {values.shape} that looks {kind}."
        )
    classes, codes = np.unique(values, return_inverse=True)
    return np.eye(len(classes), dtype=np.float32)[codes]
