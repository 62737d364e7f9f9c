"""What a frozen run gives to the fine-tuning that begins where it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from torch import Tensor

from cxr_cache.common.wording import count, describe_differences, find_differences
from cxr_cache.config import FinetuneConfig
from cxr_cache.datasets.splits import Split
from cxr_cache.encoders.identity import compare_encoders
from cxr_cache.errors import RunError
from cxr_cache.models.aligned import align_run
from cxr_cache.models.run import Run
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import LabelledRows
from cxr_cache.training.losses import LOSS_OPTIONS

_OF_THE_RUN: Final = (
    *("level", "n_folds", "test_fraction", "split", "split_by", "seed", "final"),
    *("hidden", "dropout", "norm", "input_norm"),
    *LOSS_OPTIONS,
)
"""Options that a fine-tuning takes from the frozen run that it starts from."""

_DECIDED_BY_THE_RUN: Final = (
    *("level", "findings", "hidden", "norm", "input_norm"),
    *("n_folds", "split", "split_by", "test_fraction"),
)
"""What cannot be chosen again after the frozen run: the shape of its heads, and its split."""


@dataclass(frozen=True)
class Start:
    """What a frozen run gives to the fine-tuning that begins where it ended."""

    split: Split
    fold_heads: tuple[dict[str, Tensor], ...]
    """The head of each fold, which has not seen that fold: the final one has."""
    final_head: dict[str, Tensor]


def config_from_run(run: Run, recipe: str = "tuned", **given: Any) -> FinetuneConfig:
    """Options for fine-tuning on from a frozen run: its folds, head, rule and calibration.

    The final model is of the run's kind, too, so that the two can be compared; a refit against an
    average of folds would show what averaging is worth. Everything else is that of the `recipe`, of
    which the reference's trains for as long as the run did. Options that the user has `given` go
    before the run's.
    """
    _require_frozen(run)
    taken = {name: run.config["train"][name] for name in _OF_THE_RUN if name in run.config["train"]}
    taken.setdefault("split", "new")  # version 0.1.0 took no given ones
    if taken["input_norm"] == "standard":
        taken["input_norm"] = "none"  # mean and spread are in the head's first layer
    if recipe == "reference":
        taken["epochs"] = (run.config["chosen_epochs"],)
    taken["threshold_rule"] = run.threshold_rule  # of the model: `evaluate` may have chosen anew
    taken["calibration"] = run.calibration.method
    return FinetuneConfig.of_recipe(recipe, **(taken | given))


def _require_frozen(run: Run) -> None:
    if run.config["kind"] != "train":
        raise RunError(
            f"{run.path} is a run of `cxr-cache {run.config['kind']}`; --from-run starts from one "
            "of `cxr-cache train`."
        )
    run.require_holdout("a fine-tuning is tested on those of the run that it starts from")
    if len(run.stores) > 1:
        raise RunError(
            f"{run.path} reads {len(run.stores)} stores side by side, and fine-tuning trains the "
            "blocks of one encoder. Start from a run on the one store whose encoder is fine-tuned."
        )
    if (features := run.config["train"].get("features", "projected")) != "projected":
        raise RunError(
            f"{run.path} was trained with --features {features}, and fine-tuning ends in the "
            "projected embedding. Start from a run with --features projected."
        )


def load_starts(
    run: Run,
    found: LabelledRows,
    store: FeatureStore,
    config: FinetuneConfig,
    n_repeats: int = 1,
) -> list[Start]:
    """Read split and heads of a frozen run, and raise unless they fit the rows and options.

    Each repeat begins with the heads of the run's own repeat of that number, so that the spread of
    the fine-tuned repeats holds that of the frozen ones.

    Raises
    ------
    RunError
        The run is of another store, other images, labels or options; both values are named. Or it
        does not have the heads of so many repeats.
    """
    missing = [repeat for repeat in range(2, n_repeats + 1) if not run.has_repeat_heads(repeat)]
    if missing:
        raise RunError(
            f"{run.path} has the heads of {count(missing[0] - 1, 'training')}, and --repeats "
            f"{n_repeats} begins each repeat with heads of its own. Train it with `cxr-cache train "
            f"--repeats {n_repeats}`, or fine-tune without --repeats."
        )
    first = _load_start(run, found, store, config)
    starts = [first]
    for repeat in range(2, n_repeats + 1):
        heads = [_pick(run.load_repeat_heads(repeat), k) for k in range(first.split.n_folds + 1)]
        starts.append(replace(first, fold_heads=tuple(heads[:-1]), final_head=heads[-1]))
    return starts


def _pick(heads: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """One head of several that lie on axis 0, as a bank of one."""
    return {name: tensor[k : k + 1] for name, tensor in heads.items()}


def _load_start(
    run: Run, found: LabelledRows, store: FeatureStore, config: FinetuneConfig
) -> Start:
    _require_frozen(run)
    model, cohort = run.load_model(), found.cohort
    recorded = (
        {"split": "new", "level": "image"}
        | run.config["train"]
        | model.head
        | {"findings": list(model.findings)}
    )
    given = asdict(config) | {"findings": list(cohort.findings), "hidden": list(config.hidden)}
    before, now = (
        {name: values[name] for name in _DECIDED_BY_THE_RUN} for values in (recorded, given)
    )
    differences = find_differences(before, now) | compare_encoders(
        model.encoder, store.header.encoder
    )
    if differences:
        raise RunError(
            f"{run.path} cannot be the start of a fine-tuning on {store.path}:\n"
            + describe_differences(differences, "in the run", "now")
            + "\nStart from a run that was trained on this store, with the same options."
        )
    split = _read_split(run, found, store, config)
    heads = run.load_fold_heads()
    fold_heads = tuple(_pick(heads, k) for k in range(split.n_folds))
    # Of an ensemble any member will do: none has seen test.
    return Start(split, fold_heads, _pick(model.head_tensors, 0))


def _read_split(
    run: Run, found: LabelledRows, store: FeatureStore, config: FinetuneConfig
) -> Split:
    """The run's split in the order of the rows."""
    cohort, studies = found.images, found.studies
    aligned = align_run(run, cohort, store.path)
    if len(aligned.cohort) < len(cohort):
        raise RunError(
            f"{run.path} was trained on {len(aligned.cohort):,} images of {store.path}, of which "
            f"{len(cohort):,} can be trained on now. Train it again on this store."
        )
    before, now = aligned.cohort.targets, cohort.targets
    if studies is not None:  # whose targets all their images have in a run
        now = studies.cohort.targets[studies.study_of]
    if not np.array_equal(before, now, equal_nan=True):
        n_other = int((~np.isclose(before, now, equal_nan=True)).any(axis=1).sum())
        raise RunError(
            f"{run.path} was trained on other targets for {n_other:,} of {len(cohort):,} images. "
            "Give the same --labels, or train it again."
        )
    whose = run.config.get("split", {}).get("whose", "")
    split = Split(aligned.is_test, aligned.fold, config.split_by, whose)
    return split if studies is None else studies.take_split(split, np.arange(len(cohort)))
