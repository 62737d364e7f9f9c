"""The three-layer focal-loss head as a scikit-learn classifier."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import BaseCrossValidator
from sklearn.utils import Tags, assert_all_finite, check_consistent_length, check_random_state
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from cxr_cache.config import Recipe, TrainConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.splits import assign_folds
from cxr_cache.errors import ConfigError, TableError
from cxr_cache.metrics.scores import auroc, macro_mean
from cxr_cache.models.heads import HeadBank
from cxr_cache.store.rows import TrainingData, prepare_embeddings
from cxr_cache.training.fit import HeadTask, count_steps, fit_heads

_SCORED_AT_ONCE: Final = 8192
_CHECKS_OF_X: Final = {"dtype": np.float32, "order": "C"}


class FocalHeadClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # have no types
    """Linear, norm, ReLU and dropout, twice, and a last linear layer, on embeddings.

    :meth:`fit` is the package's own training (:func:`cxr_cache.training.fit.fit_heads`) on all
    rows, for a fixed number of epochs. Defaults are those of the recipe ``tuned``
    (:data:`cxr_cache.config.RECIPES`) and the number of epochs that was best on real radiographs,
    except that the learning rate stays constant, for nothing is held out here that could say when
    to lower it.

    A `y` of shape ``(N, F)`` has one column per finding: 1 present, 0 absent, NaN unlabelled. A
    `y` of shape ``(N,)`` holds two classes of any kind; more are refused, since the head knows no
    classes that exclude each other.

    Parameters
    ----------
    n_epochs
        Passes over the rows. Each has as many full batches as there are; the few rows left over
        wait for the next shuffle.
    batch_size
        Rows per step, at least 2, at most N: fewer than 64 rows need a smaller one.
    learning_rate, weight_decay
        Of AdamW (Loshchilov & Hutter 2019).
    max_grad_norm
        Gradients are scaled down to this Euclidean norm; None for no limit.
    schedule
        ``constant``, ``cosine`` or ``one-cycle``; the last two end after `n_epochs`.
    loss, alpha, gamma
        As :func:`cxr_cache.training.losses.make_loss` describes them.
    hidden
        Width of each hidden layer.
    dropout
        Probability of dropping a hidden unit.
    norm
        ``batch`` or ``layer``: what follows each hidden layer.
    input_norm
        ``l2`` divides every row by its length, as embeddings of CLIP models are compared;
        ``standard`` gives each column mean 0 and spread 1 over the rows of :meth:`fit`; ``none``
        takes rows as they are, which suits a pipeline that scales them.
    device
        ``cpu``, ``cuda``, or ``auto``.
    random_state
        Seed of the initial weights, the order of the rows and dropout.

    Attributes
    ----------
    classes_
        The two classes of a 1-d `y`; else a list of F arrays ``[0, 1]``, as scikit-learn's
        forests have it.
    head_ : torch.nn.Sequential
        The trained head, embeddings ``(B, D)`` to logits ``(B, F)``, in evaluation mode, on the
        CPU.
    loss_curve_
        Mean training loss of every epoch, ``(n_epochs,)``.
    n_features_in_
        D.

    Notes
    -----
    Probabilities of a network trained with a focal loss are not calibrated, and those of a rare
    finding seldom reach one half, where :meth:`predict` draws the line. Rank with
    :meth:`predict_proba`, or choose thresholds on rows that the head has not seen.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 2, (200, 3)).astype(float)  # three findings
    >>> X = y @ rng.normal(size=(3, 16)) + rng.normal(size=(200, 16))
    >>> y[0, 2] = np.nan  # unlabelled
    >>> head = FocalHeadClassifier(n_epochs=10, learning_rate=1e-2, hidden=(32,), random_state=0)
    >>> head.fit(X, y).predict_proba(X).shape
    (200, 3)
    """

    def __init__(
        self,
        *,
        n_epochs: int = 20,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        weight_decay: float = Recipe.weight_decay,
        max_grad_norm: float | None = Recipe.max_grad_norm,
        schedule: str = "constant",
        loss: str = Recipe.loss,
        alpha: float = Recipe.alpha,
        gamma: float = Recipe.gamma,
        hidden: tuple[int, ...] = Recipe.hidden,
        dropout: float = Recipe.dropout,
        norm: Literal["batch", "layer"] = Recipe.norm,
        input_norm: Literal["l2", "standard", "none"] = Recipe.input_norm,
        device: str = Recipe.device,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.schedule = schedule
        self.loss = loss
        self.alpha = alpha
        self.gamma = gamma
        self.hidden = hidden
        self.dropout = dropout
        self.norm = norm
        self.input_norm = input_norm
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.classifier_tags.multi_label = True
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike) -> FocalHeadClassifier:
        """Train a head from scratch.

        Parameters
        ----------
        X
            Embeddings, ``(N, D)``.
        y
            ``(N, F)`` of 1, 0 and NaN, or ``(N,)`` of two classes. Rows without any label take no
            part.

        Raises
        ------
        ConfigError
            A parameter is out of its range, or there are fewer rows than `batch_size`.
        TableError
            `y` holds anything but 1, 0 and NaN, or a single class.
        TrainingError
            The loss is no longer finite.
        """
        config = self._config()
        embeddings, y = self._validate(X, y)
        targets = self._encode(y)
        rows = np.flatnonzero(~np.isnan(targets).all(axis=1))
        if len(rows) < self.batch_size:
            raise ConfigError(
                f"FocalHeadClassifier with batch_size={self.batch_size} needs as many labelled "
                f"rows, but got n_samples = {len(rows)}. Use a smaller batch_size, or more rows."
            )
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        task = HeadTask(rows, np.empty(0, np.int64), seed)
        prepared = self._prepare(embeddings)
        trajectory = fit_heads(
            TrainingData(prepared[None], _as_cohort(targets)),
            [task],
            config,
            n_epochs=self.n_epochs,
            n_steps=count_steps([task], self.batch_size),
            keep=[self.n_epochs],
        )[0]
        bank = HeadBank.from_snapshot(trajectory.weights[self.n_epochs], dropout=self.dropout)
        self.head_ = bank.as_sequential(0)
        self.loss_curve_ = np.array([epoch["train_loss"] for epoch in trajectory.history])
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Logits: ``(N, F)``, or ``(N,)``, of ``classes_[1]``, where `y` had one dimension."""
        check_is_fitted(self)
        embeddings = validate_data(self, X, reset=False, **_CHECKS_OF_X)
        prepared = torch.from_numpy(self._prepare(embeddings))
        # In float64 a row's logits do not depend on which rows stand beside it.
        head = copy.deepcopy(self.head_).double()
        with torch.inference_mode():
            parts = [head(part.double()) for part in torch.split(prepared, _SCORED_AT_ONCE)]
        logits: NDArray[np.float64] = torch.cat(parts).numpy()
        return logits if self._is_multilabel() else logits[:, 0]

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probability of each finding, ``(N, F)``; or of both classes, ``(N, 2)``."""
        probabilities: NDArray[np.float64] = expit(self.decision_function(X))
        if self._is_multilabel():
            return probabilities
        return np.stack([1 - probabilities, probabilities], axis=1)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """What is more likely than not: 1 or 0, ``(N, F)``; or one of the classes, ``(N,)``."""
        present = (self.decision_function(X) > 0).astype(np.int64)
        return present if self._is_multilabel() else np.asarray(self.classes_[present])

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Macro AUROC, over the findings that `y` has both a positive and a negative of.

        Accuracy, which other classifiers return here, is high for whoever never calls a rare
        finding. Where no AUROC is defined, the score is NaN.
        """
        probabilities = self.predict_proba(X)
        values = np.asarray(y)
        if self._is_multilabel():
            return float(macro_mean(auroc(values.astype(np.float32), probabilities)))
        targets = (values == self.classes_[1]).astype(np.float32)
        return float(macro_mean(auroc(targets[:, None], probabilities[:, 1:])))

    def _config(self) -> TrainConfig:
        """The parameters as the training takes them, each checked."""
        if self.schedule == "plateau":
            raise ConfigError(
                "schedule='plateau' lowers the learning rate when a held-out loss stops falling, "
                "and fit holds nothing out. Use 'constant', 'cosine' or 'one-cycle'."
            )
        recipe = self.get_params(deep=False)
        del recipe["random_state"]
        return TrainConfig(epochs=(recipe.pop("n_epochs"),), **recipe)

    def _validate(self, X: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Finite float32 embeddings, and `y` with one or two dimensions, possibly NaN."""
        checks_of_y = {"ensure_2d": False, "dtype": None, "ensure_all_finite": "allow-nan"}
        embeddings, values = validate_data(
            self, X, y, validate_separately=(_CHECKS_OF_X, checks_of_y)
        )
        check_consistent_length(embeddings, values)
        return embeddings, values

    def _prepare(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """As the head reads them; a copy where they are read-only, which torch warns of."""
        return np.require(prepare_embeddings(embeddings, self.input_norm), requirements="W")

    def _encode(self, y: NDArray[Any]) -> NDArray[np.float32]:
        """Targets, ``(N, F)``; sets `classes_`."""
        if y.ndim == 2:
            if (wrong := ~(np.isin(y, (0, 1)) | (y != y))).any():
                row, column = np.argwhere(wrong)[0]
                raise TableError(
                    f"y holds {y[row, column]!r} in row {row}, column {column}; findings are 1 "
                    "present, 0 absent and NaN unlabelled."
                )
            self.classes_: Any = [np.array([0, 1])] * y.shape[1]
            return np.array(y, np.float32)
        assert_all_finite(y, input_name="y")  # only a finding can be unlabelled
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if kind.startswith("continuous"):
            raise TableError(f"Unknown label type: {kind}. Give two classes, or (N, F) findings.")
        if kind != "binary":
            raise TableError(
                f"Only binary classification is supported. The type of the target is {kind}. "
                "Give findings that may occur together as y of shape (N, F)."
            )
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise TableError(f"y holds 1 class, {self.classes_.tolist()[0]!r}; there must be two.")
        return np.asarray(y == self.classes_[1], np.float32)[:, None]

    def _is_multilabel(self) -> bool:
        return isinstance(self.classes_, list)


def _as_cohort(targets: NDArray[np.float32]) -> Cohort:
    """Rows that are known by their number only."""
    numbers = np.arange(len(targets))
    images = pd.DataFrame({"image_id": numbers, "study_uid": numbers})
    return Cohort(images, targets, tuple(map(str, range(targets.shape[1]))))


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
