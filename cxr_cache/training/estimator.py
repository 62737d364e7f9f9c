"""The three-layer focal-loss head as a scikit-learn classifier, and its folds as a splitter."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import BaseCrossValidator
from sklearn.utils import Tags, assert_all_finite, check_consistent_length, check_random_state
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from cxr_cache.config import TrainConfig
from cxr_cache.datasets.splits import TEST, Split, assign_folds
from cxr_cache.errors import ConfigError, TableError
from cxr_cache.metrics.scores import auroc, macro_mean
from cxr_cache.models.heads import HeadBank
from cxr_cache.store.rows import prepare_embeddings
from cxr_cache.training.fit import OnEpoch, PlainRows, telling
from cxr_cache.training.search import final_members, refit, search_epochs, train_final

_SCORED_AT_ONCE: Final = 8192
_CHECKS_OF_X: Final = {"dtype": np.float32, "order": "C"}
_OF_THE_STORE: Final = ("test_fraction", "split", "split_by", "level", "features", "flip")
_OTHERWISE_SAID: Final = (
    *("seed", "threshold_rule", "min_positives", "calibration", "baseline"),
    *("protocol", "n_outer_folds"),
)
"""Options of a recipe that are no parameters: `random_state` is the seed, and predictions are
neither calibrated nor cut."""
_DEFAULTS: Final = {
    name: value
    for name, value in vars(TrainConfig()).items()
    if name not in (*_OF_THE_STORE, *_OTHERWISE_SAID)
}


class FocalHeadClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # have no types
    """Linear, norm, ReLU and dropout, twice, and a last linear layer, on embeddings.

    :meth:`fit` does with its rows what ``cxr-cache train`` does with its training rows, and every
    default is that of :class:`cxr_cache.config.TrainConfig`: folds of whole groups, a search for
    the number of epochs on what each fold holds out, and the final model that follows from it.
    With the same seed, rows and groups, both predict the same.

    A `y` of shape ``(N, F)`` has one column per finding: 1 present, 0 absent, NaN unlabelled. A
    `y` of shape ``(N,)`` holds two classes of any kind; more are refused, since the head knows no
    classes that exclude each other.

    Parameters
    ----------
    epochs
        Passes over the rows: candidates, of which the best on held-out rows is taken, or one
        number. Each pass has as many full batches as there are; the few rows left over wait for
        the next shuffle.
    n_folds
        Folds of the search.
    final
        ``refit`` trains the final model on all rows, ``ensemble`` averages the folds' models, and
        ``best-fold`` takes the best of them.
    batch_size
        Rows per step, from 2 up to the rows that a fold trains on.
    learning_rate, weight_decay
        Learning rate and weight decay of AdamW (Loshchilov & Hutter 2019).
    max_grad_norm
        Gradients are scaled down to this Euclidean norm; None sets no limit.
    schedule
        ``plateau`` halves the learning rate after more than `patience` epochs without a better
        held-out loss; ``constant`` keeps it; ``cosine`` and ``one-cycle`` end with the last epoch.
    patience
        Epochs that ``plateau`` waits.
    early_stopping
        Epochs without a better held-out loss after which a fold stops; None trains on.
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
        ``standard`` gives each column mean 0 and spread 1 over the rows that are trained on;
        ``none`` takes rows as they are, which suits a pipeline that scales them.
    device
        ``cpu``, ``cuda``, or ``auto``.
    n_jobs
        Processes that share the folds on the CPU; -1 is one per core. Little work starts none.
    random_state
        Seed of folds, initial weights, the order of the rows and dropout.

    Attributes
    ----------
    classes_
        The two classes of a 1-d `y`, ``(2,)``; else a row ``[0, 1]`` per finding, ``(F, 2)``.
    epoch_search_ : pandas.DataFrame or None
        One row per candidate: epochs, mean_auroc, std_auroc, fold_1 ... fold_K; None where no
        folds were needed.
    epochs_
        The number of epochs that was chosen.
    heads_ : list of torch.nn.Sequential
        The trained heads, whose probabilities are averaged: embeddings ``(B, D)`` to logits
        ``(B, F)``, in evaluation mode, on the CPU.
    head_ : torch.nn.Sequential
        The only one of them, where there is one.
    loss_curve_
        Mean training loss of every epoch of the final model, ``(epochs_,)``; of an ensemble the
        mean over its members.
    n_features_in_
        D.

    Notes
    -----
    Folds change nothing where `epochs` is one number, `final` is ``refit``, and neither the
    schedule nor early stopping asks for held-out rows. :meth:`fit` then trains one head on all
    rows and nothing else, which is what a search by scikit-learn wants: it brings folds of its own.

    Probabilities of a network trained with a focal loss are not calibrated, and those of a rare
    finding seldom reach one half, where :meth:`predict` draws the line. Rank with
    :meth:`predict_proba`, or choose thresholds on rows that the head has not seen.

    scikit-learn's ``cross_val_predict`` numbers the values of `y` anew for every method but
    ``predict``, so that it cannot be used where findings are unlabelled: NaN would become a class.
    ``cross_validate`` with ``return_estimator`` and ``return_indices`` leaves `y` as it is.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 2, (200, 3)).astype(float)  # three findings
    >>> X = y @ rng.normal(size=(3, 16)) + rng.normal(size=(200, 16))
    >>> y[0, 2] = np.nan  # unlabelled
    >>> patients = np.arange(200) // 2
    >>> head = FocalHeadClassifier(epochs=(2, 4), hidden=(32,), batch_size=32, random_state=0)
    >>> head.fit(X, y, groups=patients).predict_proba(X).shape
    (200, 3)
    >>> head.epochs_ in head.epoch_search_["epochs"].tolist()
    True

    Without folds, in a search by scikit-learn over whole patients:

    >>> from sklearn.model_selection import GridSearchCV
    >>> plain = FocalHeadClassifier(
    ...     epochs=4, schedule="constant", final="refit", hidden=(32,), batch_size=32
    ... )
    >>> folds = GroupedMultilabelSplit(n_splits=3, random_state=0)
    >>> search = GridSearchCV(plain, {"learning_rate": [1e-5, 1e-2]}, cv=folds)
    >>> search.fit(X, y, groups=patients).best_params_
    {'learning_rate': 0.01}
    """

    def __init__(
        self, *, random_state: int | np.random.RandomState | None = None, **recipe: Any
    ) -> None:
        if unknown := recipe.keys() - _DEFAULTS:
            raise TypeError(
                f"FocalHeadClassifier has no parameter {min(unknown)!r}; its parameters are "
                f"{', '.join(_DEFAULTS)} and random_state."
            )
        for name, default in _DEFAULTS.items():
            setattr(self, name, recipe.get(name, default))
        self.random_state = random_state

    # scikit-learn reads the parameters here: one for each option of the recipe, and the seed.
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
                for name, default in [*_DEFAULTS.items(), ("random_state", None)]
            ),
        ]
    )

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.classifier_tags.multi_label = True
        tags.target_tags.multi_output = True
        return tags

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        groups: ArrayLike | None = None,
        *,
        on_epoch: OnEpoch | None = None,
    ) -> FocalHeadClassifier:
        """Choose the number of epochs in folds, and train the final model.

        Parameters
        ----------
        X
            Embeddings, ``(N, D)``.
        y
            ``(N, F)`` of 1, 0 and NaN, or ``(N,)`` of two classes. Rows without any label take no
            part.
        groups
            Patient or study of each row, ``(N,)``: no group is on both sides of a fold. Without
            it, every row stands for itself.
        on_epoch
            Called after every epoch, as in :func:`cxr_cache.train_head`.

        Raises
        ------
        ConfigError
            A parameter is out of its range, a group is missing, or there are fewer rows than
            `batch_size` or fewer groups than folds.
        TableError
            `y` holds anything but 1, 0 and NaN, or a single class.
        TrainingError
            The loss is no longer finite, or no AUROC is defined in some fold.
        """
        config = self._config()
        embeddings, y = self._validate(X, y)
        rows = PlainRows(self._prepare(embeddings)[None], self._encode(y))
        labelled = np.asarray((~np.isnan(rows.targets)).any(axis=1))
        if labelled.sum() < config.batch_size:
            raise ConfigError(
                f"FocalHeadClassifier with batch_size={config.batch_size} needs as many labelled "
                f"rows, but got n_samples = {labelled.sum()}. Use a smaller batch_size, or more "
                "rows."
            )
        fold = np.where(labelled, 0, TEST).astype(np.int64)
        with telling(on_epoch):
            bank, history, members = self._train(rows, labelled, fold, groups, config)
        self.heads_ = [bank.as_sequential(h) for h in range(bank.n_heads)]
        self.loss_curve_ = _mean_losses([history] if history else members)
        return self

    def _train(
        self,
        rows: PlainRows,
        labelled: NDArray[np.bool_],
        fold: NDArray[np.int64],
        groups: ArrayLike | None,
        config: TrainConfig,
    ) -> tuple[HeadBank, list[dict[str, float]], list[list[dict[str, float]]]]:
        """The final heads, their history and that of members; sets what the search found."""
        if not self._needs_folds(config):
            self.epoch_search_: pd.DataFrame | None = None
            self.epochs_ = config.epochs[0]
            bank, history = refit(rows, Split(~labelled, fold), config, n_epochs=self.epochs_)
            return bank, history, []
        whole = _read_groups(groups, len(fold))
        fold[labelled] = assign_folds(
            rows.targets[labelled], whole[labelled], config.n_folds, config.seed
        )
        split = Split(~labelled, fold)
        search = search_epochs(rows, split, config, clusters=whole)
        bank, history = train_final(rows, split, search, config)
        members = [m.history[: search.chosen] for m in final_members(search, config)]
        self.epoch_search_ = search.table
        self.epochs_ = search.chosen
        return bank, history, members

    @property
    def head_(self) -> nn.Sequential:
        """The trained head, where there is one; an ensemble has several :attr:`heads_`."""
        if len(getattr(self, "heads_", ())) != 1:
            raise AttributeError("head_ is there after a fit that ends with one head; see heads_.")
        return self.heads_[0]

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Logits: ``(N, F)``, or ``(N,)``, of ``classes_[1]``, where `y` had one dimension.

        Of an ensemble they are the log-odds of the mean probability.
        """
        check_is_fitted(self)
        embeddings = validate_data(self, X, reset=False, **_CHECKS_OF_X)
        prepared = torch.from_numpy(self._prepare(embeddings))
        # In float64 a row's logits do not depend on which rows stand beside it.
        heads = [copy.deepcopy(head).double() for head in self.heads_]
        with torch.inference_mode():
            parts = [
                _average_logits(torch.stack([head(part.double()) for head in heads]))
                for part in torch.split(prepared, _SCORED_AT_ONCE)
            ]
        logits: NDArray[np.float64] = torch.cat(parts).numpy()
        return logits if self._is_multilabel() else logits[:, 0]

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probability of each finding, ``(N, F)``; or of both classes, ``(N, 2)``."""
        return self._of_classes(X, expit)

    def predict_log_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Logarithm of :meth:`predict_proba`."""
        return self._of_classes(X, log_expit)

    def _of_classes(self, X: ArrayLike, function: Any) -> NDArray[np.float64]:
        logits = self.decision_function(X)
        if not self._is_multilabel():
            logits = np.stack([-logits, logits], axis=1)
        values: NDArray[np.float64] = function(logits)
        return values

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """What is more likely than not: 1 or 0, ``(N, F)``; or one of the classes, ``(N,)``."""
        present = (self.decision_function(X) > 0).astype(np.int64)
        return present if self._is_multilabel() else np.asarray(self.classes_[present])

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Macro AUROC, over the findings that `y` has both a positive and a negative of.

        Accuracy, which other classifiers return here, is high for whoever never calls a rare
        finding. Where no AUROC is defined, the score is NaN.
        """
        probabilities, values = self.predict_proba(X), _to_array(y)
        if self._is_multilabel():
            return float(macro_mean(auroc(values.astype(np.float32), probabilities)))
        targets = (values == self.classes_[1]).astype(np.float32)
        return float(macro_mean(auroc(targets[:, None], probabilities[:, 1:])))

    def _config(self) -> TrainConfig:
        """The parameters as the training takes them, each checked."""
        recipe = self.get_params(deep=False)
        return TrainConfig(seed=_draw_seed(recipe.pop("random_state")), **recipe)

    @staticmethod
    def _needs_folds(config: TrainConfig) -> bool:
        """Whether anything about the final model follows from rows that are held out."""
        asks = config.schedule == "plateau" or config.early_stopping is not None
        return asks or config.final != "refit" or len(config.epochs) > 1

    def _validate(self, X: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Finite float32 embeddings, and `y` with one or two dimensions, possibly NaN."""
        checks_of_y = {"ensure_2d": False, "dtype": None, "ensure_all_finite": "allow-nan"}
        embeddings, values = validate_data(
            self,
            X,
            _to_array(y) if isinstance(y, pd.DataFrame) else y,
            validate_separately=(_CHECKS_OF_X, checks_of_y),
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
                    "present, 0 absent and NaN unlabelled. (cross_val_predict makes classes of "
                    "missing values: see the notes of FocalHeadClassifier.)"
                )
            # Of shape (F, 2): from (2,), scorers would take two findings for two classes of one.
            self.classes_ = np.tile([0, 1], (y.shape[1], 1))
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
        return self.classes_.ndim == 2


def _average_logits(logits: torch.Tensor) -> torch.Tensor:
    """Log-odds of the mean probability of several heads, ``(H, N, F)`` -> ``(N, F)``."""
    present, absent = (torch.logsumexp(F.logsigmoid(z), dim=0) for z in (logits, -logits))
    return present - absent


def _mean_losses(histories: Sequence[Sequence[dict[str, float]]]) -> NDArray[np.float64]:
    """Training loss of every epoch, averaged over the heads that came so far."""
    longest = max(map(len, histories))
    curves = [
        [epoch["train_loss"] for epoch in history] + [np.nan] * (longest - len(history))
        for history in histories
    ]
    return np.asarray(np.nanmean(curves, axis=0))


def _read_groups(groups: ArrayLike | None, n_rows: int) -> NDArray[Any]:
    """The group of each row; each row by itself where none are given."""
    if groups is None:
        return np.arange(n_rows)
    values = np.asarray(groups)
    if values.shape != (n_rows,):
        raise ConfigError(f"groups has shape {values.shape}; X has {n_rows} rows. Give one each.")
    if (missing := np.flatnonzero(pd.isna(values))).size:
        raise ConfigError(
            f"groups has no value in row {missing[0]}, and {len(missing):,} such rows in all. Give "
            "every row its patient or study; a row that stands for itself needs a name of its own."
        )
    return values


def _draw_seed(random_state: int | np.random.RandomState | None) -> int:
    """A number as it is, else one that is drawn."""
    if isinstance(random_state, int | np.integer):
        return int(random_state)
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def _to_array(y: ArrayLike) -> NDArray[Any]:
    """Targets or labels; missing values of a frame, of whatever kind, are NaN."""
    if isinstance(y, pd.DataFrame):
        return np.asarray(y.astype(object).mask(y.isna(), np.nan))
    return np.asarray(y)


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
        seed = _draw_seed(self.random_state)
        fold = assign_folds(_as_targets(y), np.asarray(groups), self.n_splits, seed)
        for k in range(self.n_splits):
            yield fold == k


def _as_targets(y: ArrayLike | None) -> NDArray[Any]:
    """Targets ``(N, F)`` as they are; of class labels, one column per class."""
    if y is None:
        raise ConfigError("GroupedMultilabelSplit needs y: what it spreads evenly over the folds.")
    values = _to_array(y)
    if values.ndim == 2:
        return values
    if (kind := type_of_target(values)) not in ("binary", "multiclass"):
        raise ConfigError(
            f"GroupedMultilabelSplit spreads findings, (N, F), or class labels, (N,), and not a y "
            f"of shape {values.shape} that looks {kind}."
        )
    classes, codes = np.unique(values, return_inverse=True)
    return np.eye(len(classes), dtype=np.float32)[codes]
