"""Every option once: its default, its meaning, its choices and what is checked of it.

The command line, the Python functions and the scikit-learn estimator all read these classes. Each
checks itself when it is made, and an error names the field. Nothing here imports anything heavy, so
that the command line can show the defaults at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import lru_cache
from numbers import Integral, Real
from types import NoneType
from typing import (
    Any,
    ClassVar,
    Final,
    Literal,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from cxr_cache.errors import ConfigError

DEFAULT_ENCODER: Final = "biomedclip"
"""A short name, which ``encoders/catalogue/known.csv`` pins to a revision."""
LOSSES: Final = ("focal", "focal-balanced", "class-balanced", "bce", "weighted-bce", "asymmetric")
"""``focal`` is the reference's variant, ``focal-balanced`` the paper's."""
SCHEDULES: Final = ("plateau", "constant", "cosine", "one-cycle")
HORIZON_SCHEDULES: Final = ("cosine", "one-cycle")
"""Schedules in which the learning rate of an epoch depends on how many epochs will follow."""
OPTIMISM_OF_PLATEAU: Final = (
    "The plateau schedule watches the held-out fold, which makes these scores up to 0.003 too good."
)
"""Measured on the Indiana images, against schedules that watch nothing."""
Features: TypeAlias = Literal["projected", "pooled", "both"]
FEATURES: Final = get_args(Features)
"""What the head reads: the embedding, what it is projected from, or the two side by side."""
POOLS: Final = ("default", "cls", "mean", "cls+mean")
TOKENS_DTYPES: Final = ("float16", "bfloat16", "float32")
BACKENDS: Final = ("loky", "dask", "ray")
THRESHOLD_RULES: Final = ("f1", "youden", "sensitivity=0.9", "specificity=0.9", "ppv=0.5")
"""Examples of how thresholds may be chosen; :data:`cxr_cache.metrics.operating_point.RULES` has
all rules."""
Calibration: TypeAlias = Literal["none", "temperature", "platt", "platt-shrunk"]
CALIBRATIONS: Final = get_args(Calibration)
SelectBy: TypeAlias = Literal["macro", "learnable", "weighted"]
RELATIONS: Final = ("same", "narrower", "broader", "differs")
"""What a finding of another data set holds, compared with the finding of a run."""
SplitBy: TypeAlias = Literal["study", "image"]
FinalModel: TypeAlias = Literal["refit", "ensemble", "best-fold"]
Norm: TypeAlias = Literal["batch", "layer"]
InputNorm: TypeAlias = Literal["l2", "standard", "none"]
Level: TypeAlias = Literal["image", "study"]
Protocol: TypeAlias = Literal["holdout", "nested"]
MapMethod: TypeAlias = Literal["pca", "umap"]


LOG_TO: Final = ("tensorboard", "wandb", "mlflow")
"""Trackers that a training can tell of its epochs."""
OUTER_FOLDS: Final = 5
"""Of a nested cross-validation, where nothing else is asked for."""
RECIPES: Final = ("tuned", "reference")
"""``tuned`` was chosen on real radiographs, ``reference`` is the published notebook's."""
MIN_POSITIVES: Final = 5
"""Chosen by ``scripts/rare_thresholds.py``."""
_CALIBRATIONS: Final = (
    "one temperature for all findings; Platt's slope and intercept for each (platt); or the same, "
    "drawn towards those of all findings the more, the fewer positives a finding has "
    "(platt-shrunk)."
)


def parse_threshold_rule(rule: str) -> tuple[str, float]:
    """Split a rule into its name and its target: ``"ppv=0.5"`` gives ``("ppv", 0.5)``.

    Rules without a target get NaN.

    Only the form is looked at here; :func:`cxr_cache.metrics.operating_point.find_rule` knows which
    rules there are.

    Raises
    ------
    ConfigError
        This is not the form of a rule, or the target does not lie in (0, 1].
    """
    name, is_target, text = rule.partition("=")
    try:
        target = float(text) if is_target else math.nan
    except ValueError:
        name = ""
    if not re.fullmatch("[a-z][a-z0-9-]*", name):
        problem = f"{rule!r} is no rule; it is one such as {', '.join(THRESHOLD_RULES)}"
        raise ConfigError(problems=[("threshold_rule", problem)])
    if is_target and not 0 < target <= 1:
        problem = f"{rule!r}: the target must lie in (0, 1]"
        raise ConfigError(problems=[("threshold_rule", problem)])
    return name, target


# -- how an option is declared and checked ------------------------------------------------

T = TypeVar("T")
R = TypeVar("R", bound="Recipe")
Check: TypeAlias = Callable[[Any], str]
"""What is wrong with a value, in words that follow the option's name; empty if nothing is."""


@dataclass(frozen=True)
class Option:
    """What is known of a field beside its name, type and default."""

    help: str
    """One or more whole sentences."""
    choices: tuple[str, ...] = ()
    check: Check = lambda _: ""
    """Applied to a value of the right type, and to each number of several; never to None."""
    flag: str = ""
    """Name on the command line; empty where it is the field's, with dashes."""
    shown: str = ""
    """The default in words, where its value does not say what it does."""
    separator: str = ","
    """What stands between several numbers on the command line."""


def option(
    default: T,
    help: str,  # noqa: A002
    *,
    choices: tuple[str, ...] = (),
    check: Check = lambda _: "",
    flag: str = "",
    shown: str = "",
    separator: str = ",",
) -> T:
    """Declare a field of a config; the arguments are those of :class:`Option`."""
    described = Option(help, choices, check, flag, shown, separator)
    return field(default=default, metadata={"option": described})


def must(holds: Callable[[Any], bool], words: str, why: str = "") -> Check:
    """A check that a value passes if the condition holds; `words` say so: "must be positive"."""
    return lambda value: "" if holds(value) else f"{words}, not {value!r}{why and f': {why}'}"


def at_least(least: int, why: str = "") -> Check:
    """A check of a number's lower bound."""
    words = f"must be {least} or more" if least else "must not be negative"
    return must(lambda value: value >= least, words, why)


_POSITIVE: Final = must(lambda x: 0 < x < math.inf, "must be positive and finite")
_FINITE: Final = must(lambda x: 0 <= x < math.inf, "must be 0 or more, and finite")
_SHARE: Final = must(lambda x: 0 <= x <= 1, "must lie in [0, 1]")
_BELOW_1: Final = must(lambda x: 0 <= x < 1, "must lie in [0, 1)")
_POSITIVE_SHARE: Final = must(lambda x: 0 < x <= 1, "must lie in (0, 1]")


@dataclass(frozen=True)
class Kind:
    """What values a field takes."""

    type: type
    """bool, int, float, str, or the class of a config inside a config."""
    is_many: bool = False
    """Whether the value is a tuple of such."""
    is_optional: bool = False
    """Whether it may be None."""
    choices: tuple[str, ...] = ()


def kinds(config: type) -> dict[str, Kind]:
    """Tell the kind of each field of a config."""
    return _read_kinds(config)


@lru_cache
def _read_kinds(config: type) -> dict[str, Kind]:
    """Tell the kind of each field from its annotation; a Literal's values are its choices."""

    def kind_of(hint: Any, choices: tuple[str, ...]) -> Kind:
        if NoneType in get_args(hint):
            [inner] = (part for part in get_args(hint) if part is not NoneType)
            kind = kind_of(inner, choices)
            return Kind(kind.type, kind.is_many, True, kind.choices)
        if get_origin(hint) is Literal:
            return Kind(str, choices=choices or get_args(hint))
        if get_origin(hint) is tuple:
            return Kind(get_args(hint)[0], is_many=True)
        return Kind(hint, choices=choices)

    hints = get_type_hints(config)
    return {f.name: kind_of(hints[f.name], option_of(f).choices) for f in fields(config)}


def option_of(of: Field[Any]) -> Option:
    """What :func:`option` declared of a field."""
    described: Option = of.metadata["option"]
    return described


def _read(value: Any, kind: Kind) -> Any:
    """The value in Python's own types, as arrays and JSON have others.

    Raises
    ------
    ValueError
        It is of another kind; the message says what it must be.
    """
    if value is None and kind.is_optional:
        return None
    if kind.is_many:
        values = (value,) if isinstance(value, Real | str) else value
        if not hasattr(values, "__iter__") or (isinstance(value, str) and kind.type is not str):
            such = "text such as ('Edema', 'Mass')" if kind.type is str else ""
            raise ValueError(f"must be {such or 'whole numbers such as (5, 10)'}, not {value!r}")
        return tuple(_read(number, Kind(kind.type)) for number in values)
    if getattr(value, "ndim", None) == 0:  # numpy's and torch's numbers
        value = value.item()
    if kind.type is int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"must be a whole number, not {value!r}")
        return int(value)
    if kind.type is float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"must be a number, not {value!r}")
        return float(value)
    if kind.choices and value not in kind.choices:
        raise ValueError(f"is one of {', '.join(kind.choices)}, not {value!r}")
    if not isinstance(value, kind.type):
        words = {bool: "true or false", str: "text"}.get(kind.type, f"of {kind.type.__name__}")
        raise ValueError(f"must be {words}, not {value!r}")
    return value


class Config:
    """Fields declared with :func:`option`, which are checked, all at once, when one is made."""

    def __post_init__(self) -> None:
        if problems := list(self._find_problems()):
            raise ConfigError(problems=problems)

    def _find_problems(self) -> Iterator[tuple[str, str]]:
        """Put every value into its own type; give field and complaint where that fails."""
        known = kinds(type(self))
        for of in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            check = option_of(of).check
            try:
                value = _read(getattr(self, of.name), known[of.name])
            except ValueError as error:
                yield of.name, str(error)
                continue
            object.__setattr__(self, of.name, value)
            several = value if isinstance(value, tuple) else (value,)
            complaints = [check(number) for number in several if number is not None]
            if complaint := next(filter(None, complaints), ""):
                yield of.name, complaint


# -- training -----------------------------------------------------------------------------

OF_THE_MACHINE: Final = ("device", "n_jobs", "num_workers", "tokens_in", "grad_checkpointing")
"""Options of training that decide where and how fast is computed, not what."""


@dataclass(frozen=True)
class Recipe(Config):
    """What training a head and fine-tuning have in common, with the reference's values."""

    reference: ClassVar[Mapping[str, Any]] = {}
    """Options in which the published notebook's recipe differs from the defaults."""
    earlier: ClassVar[Mapping[str, Any]] = {"select_by": "macro", "min_positives": 0}
    """What was done by versions that had no such option, where that is not the default now."""

    epochs: tuple[int, ...] = option(
        (30, 50, 75, 90, 100),
        "Candidate numbers of epochs, of which cross-validation chooses the best.",
        check=at_least(1),
    )
    n_folds: int = option(5, "Number of cross-validation folds.", flag="--folds", check=at_least(2))
    test_fraction: float = option(
        0.2,
        "Share of the data that is set aside for the test, where a new split is made.",
        check=must(lambda x: 0 < x < 1, "must lie between 0 and 1"),
    )
    split: Literal["given", "new"] = option(
        "given",
        "Which split is used. given takes the test images and folds that the data set came with, "
        "and makes what it lacks; new makes them all. Images marked val are trained on: the folds "
        "take their part.",
    )
    split_by: SplitBy = option(
        "study",
        "What is kept whole in the split. study keeps all images of a patient on one side, or of a "
        "study where patients are unknown; image splits single images, as the published notebook "
        "did, so that a patient can be in training and in the test.",
    )
    level: Level = option(
        "image",
        "What is given a prediction: each image by itself, or each study as a whole. study reads "
        "the mean of a study's frontal images beside that of its lateral ones, either of which may "
        "be missing.",
    )
    final: FinalModel = option(
        "refit",
        "What becomes the final model: one trained again on all folds (refit), the average of the "
        "folds' models (ensemble), or the best of them (best-fold, as the published notebook did).",
    )
    seed: int = option(
        42, "Seed of the split, the initial weights, the order and dropout.", check=at_least(0)
    )
    batch_size: int = option(
        16, "Images, or studies, per step.", check=at_least(2, "batch norm needs two rows")
    )
    learning_rate: float = option(2e-5, "Learning rate of AdamW.", flag="--lr", check=_POSITIVE)
    weight_decay: float = option(1e-4, "Weight decay of AdamW.", check=_FINITE)
    max_grad_norm: float | None = option(
        1.0,
        "Largest norm of the gradient, to which longer gradients are shortened; none sets no "
        "limit.",
        flag="--clip",
        check=must(lambda x: x > 0, "must be positive"),
    )
    schedule: str = option(
        "plateau",
        "How the learning rate changes. plateau halves it when the validation loss has not "
        "improved for more than --patience epochs.",
        choices=SCHEDULES,
    )
    patience: int = option(
        3,
        "Number of epochs without a better validation loss that the plateau schedule waits for.",
        check=at_least(0),
    )
    early_stopping: int | None = option(
        None,
        "Stop a fold after this many epochs without a better validation loss.",
        shown="train on",
        check=at_least(1),
    )
    loss: str = option(
        "focal",
        "Loss function. focal multiplies every term by alpha, as the published notebook did; "
        "focal-balanced is that of the paper (Lin et al. 2017): positives by alpha, negatives by "
        "1 - alpha.",
        choices=LOSSES,
    )
    alpha: float = option(0.25, "Weight alpha of focal and focal-balanced.", check=_SHARE)
    gamma: float = option(
        2.0,
        "Focusing exponent of the focal losses, class-balanced and asymmetric (whose authors use "
        "4).",
        check=_FINITE,
    )
    hidden: tuple[int, ...] = option(
        (512, 256),
        "Widths of the head's hidden layers, joined by x; none leaves a linear head.",
        check=at_least(1),
        separator="x",
    )
    dropout: float = option(
        0.5, "Probability that a hidden unit is left out of a training step.", check=_BELOW_1
    )
    norm: Norm = option("batch", "Normalisation that follows each hidden layer.")
    input_norm: InputNorm = option(
        "l2",
        "What is done to embeddings before the head. l2 scales each to length 1; standard gives "
        "each of its numbers mean 0 and spread 1 over the training images.",
    )
    device: str = option("cpu", "Device to train on: auto, cpu, cuda, cuda:1 or mps.")
    threshold_rule: str = option(
        "f1",
        "Rule that chooses each finding's threshold on out-of-fold predictions, such as "
        f"{', '.join(THRESHOLD_RULES)}.",
    )
    min_positives: int = option(
        MIN_POSITIVES,
        "Positive training patients (or studies, where patients are unknown) that a finding needs "
        "to get a threshold. With fewer it is ranked only, and counts in no figure at thresholds.",
        check=at_least(0),
    )
    calibration: Calibration = option(
        "none",
        f"Calibration of the probabilities, fitted on out-of-fold predictions: {_CALIBRATIONS}",
    )
    select_by: SelectBy = option(
        "macro",
        "What the number of epochs is chosen by. macro is the mean AUROC over all findings; "
        "learnable, over those with 10 positive training patients or studies or more; weighted "
        "weights findings by the inverse variance that their AUROC has for its number of positives "
        "and negatives.",
    )
    within_one_se: bool = option(
        False,
        "Choose the smallest number of epochs whose score lies within one standard error of the "
        "best one's. The standard error is that of their difference over the folds.",
    )

    def _find_problems(self) -> Iterator[tuple[str, str]]:
        yield from super()._find_problems()
        if self.epochs == ():
            yield "epochs", "must be 1 or more, and there are none"
        if (self.level, self.split_by) == ("study", "image"):
            yield "split_by", "must be study where the level is study, which needs whole studies"
        try:
            parse_threshold_rule(str(self.threshold_rule))
        except ConfigError as error:
            yield from error.problems

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "epochs", tuple(sorted(set(self.epochs))))

    @classmethod
    def of_recipe(cls: type[R], name: str, **options: Any) -> R:
        """Make the recipe called `name`, of :data:`RECIPES`, except for the options given."""
        if name not in RECIPES:
            problem = f"is one of {', '.join(RECIPES)}, not {name!r}"
            raise ConfigError(problems=[("recipe", problem)])
        return cls(**{**cls.reference, **options} if name == "reference" else options)

    @property
    def has_horizon(self) -> bool:
        """Whether an epoch's learning rate depends on how many epochs will follow."""
        return self.schedule in HORIZON_SCHEDULES


def _other(name: str, default: T, help: str = "") -> T:  # noqa: A002
    """The option called `name` of :class:`Recipe`, with another default or meaning."""
    [known] = (option_of(of) for of in fields(Recipe) if of.name == name)
    return option(default, help or known.help, **_without(known, "help"))


def _without(known: Option, name: str) -> dict[str, Any]:
    return {key: value for key, value in vars(known).items() if key != name}


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """How to search and train a head on cached embeddings; by default the tuned recipe.

    It was chosen on out-of-fold predictions; docs/measurements.md compares it with the reference's
    on test studies.

    Examples
    --------
    >>> TrainConfig(epochs=(10, 20), loss="bce").learning_rate
    0.001
    >>> TrainConfig.of_recipe("reference").epochs
    (30, 50, 75, 90, 100)
    """

    reference: ClassVar[Mapping[str, Any]] = {
        name: Recipe.__dataclass_fields__[name].default
        for name in ("epochs", "batch_size", "learning_rate", "final", "calibration", "select_by")
    }

    epochs: tuple[int, ...] = _other("epochs", (5, 10, 20, 30, 50))
    batch_size: int = _other("batch_size", 64)
    learning_rate: float = _other("learning_rate", 1e-3)
    final: FinalModel = _other("final", "ensemble")
    calibration: Calibration = _other("calibration", "platt-shrunk")
    select_by: SelectBy = _other("select_by", "learnable")
    features: Features = option(
        "projected",
        "What the head reads: the projected embedding, the pooled features that it is projected "
        "from, or both.",
    )
    flip: bool = option(True, "Train on the mirror images too, where the store has them.")
    baseline: bool = option(
        True,
        "Also train an L2-regularised logistic regression on the same folds and features, which "
        "stands beside the head.",
    )
    n_jobs: int = option(
        -1,
        "Number of processes that share the folds on the CPU; -1 uses one per core.",
        flag="--jobs",
    )
    protocol: Protocol = option(
        "holdout",
        "How the recipe is tested. holdout sets one part of the data aside for the test; nested "
        "tests every image once: each of the outer folds in turn, by a model that the whole search "
        "on the others makes. It is for data sets of which a fifth is too few to test on.",
    )
    n_outer_folds: int | None = option(
        None,
        "With --protocol nested: number of outer folds, each of whole patients.",
        flag="--outer-folds",
        shown=f"{OUTER_FOLDS} with --protocol nested",
        check=at_least(2),
    )

    def _find_problems(self) -> Iterator[tuple[str, str]]:
        yield from super()._find_problems()
        if self.protocol == "holdout":
            if self.n_outer_folds is not None:
                yield "n_outer_folds", "goes with the protocol nested; holdout has one test part"
            return
        if self.split_by == "image":
            yield (
                "split_by",
                "must be study where the protocol is nested, which keeps patients whole",
            )
        if self.test_fraction != type(self).test_fraction:
            yield "test_fraction", "goes with the protocol holdout; nested tests each outer fold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol == "nested" and self.n_outer_folds is None:
            object.__setattr__(self, "n_outer_folds", OUTER_FOLDS)

    @property
    def of_outer_fold(self) -> TrainConfig:
        """The recipe as each outer fold is trained and tested with it: as a holdout."""
        return replace(self, protocol="holdout", n_outer_folds=None)


@dataclass(frozen=True)
class RepeatConfig(Config):
    """How often a recipe is trained."""

    n_repeats: int = option(
        1,
        "Number of trainings on the same split, each from its own seed. The first becomes the "
        "run's model; compare and the run's figures of the recipe use all of them.",
        flag="--repeats",
        check=at_least(1),
    )


@dataclass(frozen=True)
class Augmentation(Config):
    """Random changes to the pixels of an image, for training end to end; none by default."""

    crop_scale: float | None = option(
        None,
        "When training from images: smallest share of the area that a random crop keeps.",
        shown="no crop",
        check=_POSITIVE_SHARE,
    )
    rotation_deg: float = option(
        0.0,
        "When training from images: largest random turn to either side, in degrees.",
        flag="--rotation",
        check=must(lambda x: 0 <= x <= 180, "must lie between 0 and 180 degrees"),
    )
    brightness: float = option(
        0.0,
        "When training from images: random change of brightness; 0.2 multiplies by 0.8 to 1.2.",
        check=_BELOW_1,
    )
    contrast: float = option(
        0.0,
        "When training from images: random change of contrast around the mean; 0.2 is ± 20 %.",
        check=_BELOW_1,
    )

    @property
    def changes_pixels(self) -> bool:
        """Whether any option is on."""
        return self != Augmentation()


@dataclass(frozen=True)
class FinetuneConfig(Recipe):
    """How to fine-tune the last blocks of the encoder together with the head; by default tuned.

    The tuned recipe was chosen on out-of-fold predictions of a pretrained DINOv2 ViT-S/14 on real
    radiographs (docs/measurements.md). Its learning rates are constant and its weights averaged, so
    that all candidate numbers of epochs are read off one training.

    Examples
    --------
    >>> FinetuneConfig(epochs=10, unfreeze_layers=4).searches  # one number of epochs: no search
    False
    """

    reference: ClassVar[Mapping[str, Any]] = {
        **{"epochs": (5, 10, 15), "learning_rate": 2e-5, "head_learning_rate": 2e-4},
        **{"batch_size": 16, "schedule": "plateau", "final": "refit"},
        **{"warmup_steps": 0, "ema_decay": 0.0, "patch_dropout": 0.0},
        **{"calibration": "none", "select_by": "macro"},
    }
    earlier: ClassVar[Mapping[str, Any]] = {
        **Recipe.earlier,
        "ema_decay": 0.0,
        "patch_dropout": 0.0,
    }

    epochs: tuple[int, ...] = _other(
        "epochs",
        (4, 5, 6, 8, 10),
        "Candidate numbers of epochs, of which cross-validation chooses the best. A single one is "
        "used without a search.",
    )
    learning_rate: float = _other("learning_rate", 2e-4, "Learning rate of the blocks.")
    batch_size: int = _other("batch_size", 32)
    schedule: str = _other("schedule", "constant")
    final: FinalModel = _other("final", "ensemble")
    input_norm: InputNorm = option(
        "l2",
        "What is done to embeddings before the head. l2 scales each to length 1; none leaves them.",
        choices=("l2", "none"),
    )
    device: str = _other("device", "auto")
    calibration: Calibration = _other("calibration", "platt-shrunk")
    select_by: SelectBy = _other("select_by", "learnable")
    unfreeze_layers: int = option(
        2, "Number of blocks of the encoder that train, counted from the end.", check=at_least(1)
    )
    head_learning_rate: float = option(
        1e-3, "Learning rate of the head.", flag="--head-lr", check=_POSITIVE
    )
    warmup_steps: int = option(
        100, "Number of steps over which both learning rates rise from zero.", check=at_least(0)
    )
    layer_decay: float = option(
        1.0,
        "Factor by which the learning rate shrinks from each block to the one before it.",
        check=_POSITIVE_SHARE,
    )
    ema_decay: float = option(
        0.99,
        "Decay per step of an exponential moving average of the weights, which is scored and saved "
        "in place of the last weights; 0 takes the last weights.",
        flag="--ema",
        check=_BELOW_1,
    )
    mixup: float = option(
        0.0,
        "Parameter alpha of mixup (Zhang et al. 2018): the tokens of two images and their losses "
        "are mixed by a share that is drawn from Beta(alpha, alpha); 0 mixes none.",
        check=_FINITE,
    )
    patch_dropout: float | None = option(
        None,
        "Share of the patches left out of every batch while training (PatchDropout, Liu et al. "
        "2023), which regularises and saves as much time. Predictions see all patches.",
        shown="0.5; 0 for encoders with rotary positions, such as DINOv3",
        check=_BELOW_1,
    )
    decay_norms: bool = option(
        True, "Apply weight decay to norms and biases too, as the published notebook did."
    )
    accumulate: int = option(
        1, "Number of batches whose gradients are averaged into one step.", check=at_least(1)
    )
    precision: str = option(
        "auto",
        "Number format that the blocks compute in. auto is bf16 where the processor computes it "
        "natively, else fp32; weights and optimiser always stay fp32.",
        choices=("auto", "fp32", "bf16"),
    )
    grad_checkpointing: bool = option(
        False,
        "Compute activations again instead of keeping them, which takes less memory and a third "
        "more work.",
    )
    source: str = option(
        "auto",
        "What to train from: the tokens in the store, or the images, end to end. auto uses tokens "
        "where the store has them.",
        choices=("auto", "tokens", "images"),
    )
    tokens_in: str = option(
        "auto",
        "Where cached tokens wait until they are needed. auto is the fastest place that they fit "
        "into.",
        choices=("auto", "device", "ram", "disk"),
    )
    flip: bool = option(False, "When training from images: show the mirror image half of the time.")
    augmentation: Augmentation = option(Augmentation(), "Random changes to the pixels.")
    num_workers: int = option(
        min(8, os.cpu_count() or 1),
        "When training from images: number of decoding processes.",
        shown="one per core, at most 8",
        check=at_least(0),
    )
    half: bool = option(
        False, "Save the trained blocks in float16, which halves the size of the file."
    )

    def _find_problems(self) -> Iterator[tuple[str, str]]:
        if isinstance(self.augmentation, Mapping):  # as JSON has it
            object.__setattr__(self, "augmentation", Augmentation(**self.augmentation))
        for name, problem in super()._find_problems():
            if (name, self.input_norm) == ("input_norm", "standard"):
                problem = (
                    "standard needs embeddings that stay as they are; fine-tuning takes l2 or none"
                )
            yield name, problem
        if self.level == "study" and self.mixup:
            yield (
                "mixup",
                "must be 0 where the level is study: the images of two studies do not pair",
            )

    @property
    def searches(self) -> bool:
        """Whether the number of epochs is looked for in all folds, or given."""
        return len(self.epochs) > 1


@dataclass(frozen=True)
class WorkersConfig(Config):
    """Which workers share out a long job; see :func:`cxr_cache.common.backends.open_backend`."""

    backend: Literal["loky", "dask", "ray"] | None = option(
        None,
        "Where to share out the work: processes of this machine (loky), a Dask or a Ray cluster.",
        shown="this process alone",
    )
    n_workers: int | None = option(
        None,
        "Number of workers to start, or to wait for.",
        flag="--workers",
        shown="one per core; all of a cluster",
        check=at_least(1),
    )
    scheduler: str | None = option(
        None,
        "Address of a running Dask or Ray cluster.",
        shown="start one on this machine",
    )


@dataclass(frozen=True)
class AblateConfig(WorkersConfig):
    """How to compare recipes; all of them share the folds."""

    epochs: tuple[int, ...] = _other(
        "epochs",
        (10, 20, 30),
        "Candidate numbers of epochs that every setting tries; it is ranked by its best.",
    )
    n_sampled: int | None = option(
        None,
        "Number of settings to try, chosen at random from all combinations.",
        flag="--sample",
        shown="all",
        check=at_least(1),
    )
    backend: Literal["loky", "dask", "ray"] = option(
        "loky",
        "Where to train: processes of this machine (loky), a Dask or a Ray cluster.",
    )
    baselines: bool = option(
        True,
        "Also rank three baselines: prevalence, logistic regression and nearest neighbours.",
    )
    n_repeats: int = option(
        1,
        "Number of times that every fold is trained, with other initial weights and, where "
        "--set n_train draws images, on others of these.",
        flag="--repeats",
        check=at_least(1),
    )
    refit: bool = option(
        False, "Train the best setting as a run in OUT/best, which is tested once."
    )


# -- reading a data set -------------------------------------------------------------------


def parse_policy(text: str, choices: tuple[str, ...]) -> tuple[str | None, dict[str, str]]:
    """Split what is made of a label code into the choice for all findings and those for some.

    Examples
    --------
    >>> parse_policy("ignore,Edema=ones", ("ignore", "zeros", "ones"))
    ('ignore', {'Edema': 'ones'})
    >>> parse_policy("Edema=ones", ("ignore", "zeros", "ones"))  # the others as the authors have it
    (None, {'Edema': 'ones'})

    Raises
    ------
    ValueError
        The text is of another form; the message says of which.
    """
    for_all: str | None = None
    for_some: dict[str, str] = {}
    for part in text.split(","):
        finding, is_one, choice = (piece.strip() for piece in part.rpartition("="))
        if choice not in choices or bool(finding) != bool(is_one):
            raise ValueError(f"is made of {', '.join(choices)} and such as Edema={choices[-1]}")
        if is_one:
            for_some[finding] = choice
        elif for_all is None:
            for_all = choice
        else:
            raise ValueError("names two choices for all findings")
    return for_all, for_some


UNCERTAIN_CHOICES: Final = ("ignore", "zeros", "ones")
BLANK_CHOICES: Final = ("ignore", "zeros")


def _is_policy(choices: tuple[str, ...]) -> Check:
    def check(value: str) -> str:
        try:
            parse_policy(value, choices)
        except ValueError as error:
            return f"must be another text: {value!r} is wrong, as it {error}"
        return ""

    return check


@dataclass(frozen=True)
class ReadConfig(Config):
    """How the tables of a data set are read; what is not said is recognised.

    Examples
    --------
    >>> ReadConfig(patient_column="MRN", uncertain="ignore,Edema=ones").readers
    'majority'
    """

    image_column: str | None = option(
        None, "Column with the paths or names of the image files.", shown="recognised by its name"
    )
    patient_column: str | None = option(
        None, "Column with the patient of each row.", shown="recognised by its name"
    )
    study_column: str | None = option(
        None, "Column with the examination of each row.", shown="recognised by its name"
    )
    view_column: str | None = option(
        None, "Column with the view, such as PA, AP or lateral.", shown="recognised by its name"
    )
    split_column: str | None = option(
        None,
        "Column with the words train, val and test (or valid, validate, dev ...).",
        shown="recognised by its name",
    )
    fold_column: str | None = option(
        None, "Column with the number of each row's fold.", shown="recognised by its name"
    )
    findings: tuple[str, ...] | None = option(
        None, "Findings to take, with commas between.", shown="all that the data set has"
    )
    uncertain: str | None = option(
        None,
        "What is made of findings that are marked uncertain (-1): ignore, zeros or ones, for all "
        "or for some, such as ignore,Edema=ones.",
        shown="as the data set's authors have it, else ignore",
        check=_is_policy(UNCERTAIN_CHOICES),
    )
    blank: str | None = option(
        None,
        "What is made of blank cells of findings: ignore leaves them unlabelled, zeros makes them "
        "absent, for all or for some, such as ignore,Edema=zeros.",
        shown="as the data set's authors have it, else ignore",
        check=_is_policy(BLANK_CHOICES),
    )
    readers: Literal["majority", "any", "all", "mean"] = option(
        "majority",
        "How several rows of one image, of several readers, become one label. majority needs more "
        "than half of them and leaves a tie unlabelled; mean counts a tie as present.",
    )
    keep_ids: bool = option(
        False, "Keep the ids of patients and studies in DICOM headers as they are, not hashed."
    )
    id_key: str | None = option(
        None,
        "File with the secret that ids in DICOM headers are hashed with.",
        shown="~/.config/cxr-cache/id_key, made when first needed",
    )


@dataclass(frozen=True)
class PlanConfig(Config):
    """What a plan of the test assumes."""

    plan_auroc: float = option(
        0.8,
        "With --plan: AUROC that is assumed of every finding.",
        check=must(lambda x: 0.5 <= x < 1, "must lie in [0.5, 1)"),
    )
    plan_width: float = option(
        0.02,
        "With --plan: half width of an interval for which test studies are counted.",
        check=must(lambda x: 0 < x < 0.5, "must lie between 0 and 0.5"),
    )
    test_fraction: float = option(
        TrainConfig.test_fraction,
        "With --plan: share of the data that is the test, unless the data set has a split.",
        check=must(lambda x: 0 < x < 1, "must lie between 0 and 1"),
    )


# -- extraction ---------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderOptions(Config):
    """Which encoder to load, and how it reads images and computes."""

    name: str = option(
        DEFAULT_ENCODER,
        "Name of the encoder: one that cxr-cache encoders lists, hf-hub:ORG/REPO[@REVISION], "
        "local-dir:FOLDER, local-file:WEIGHTS, timm:NAME, an open_clip name, or "
        "random:TIMM_NAME[:SEED]. ?img_size=224 behind it asks for images of another size than its "
        "own, and ?file=WEIGHTS for one file of a folder or repository.",
        flag="--model",
    )
    device: str = option("auto", "Device to compute on: auto, cpu, cuda, cuda:1 or mps.")
    precision: str = option(
        "auto",
        "Number format to compute in. auto is bf16 where the processor computes it natively, else "
        "fp32.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    resize: Literal["squash", "crop", "pad"] | None = option(
        None,
        "How an image becomes square: squash squeezes it into shape, crop cuts out its middle, pad "
        "adds black margins.",
        shown="as the encoder's configuration says",
    )
    normalize: Literal["encoder", "imagenet"] = option(
        "encoder", "Whose mean and standard deviation of pixels to use."
    )
    bits_stored: int | None = option(
        None, "Number of bits that are in use in 16-bit image files, such as 12.", shown="all 16"
    )
    antialias: bool = option(
        True,
        "Smooth images that become smaller. --no-antialias is for encoders that were trained or "
        "evaluated on those of tf.image.resize, such as MedSigLIP.",
    )
    pool: str = option(
        "default",
        "What of a vision transformer becomes the embedding: its own way, or after its final norm "
        "the class token (cls), the mean over patches, or the two side by side.",
        choices=POOLS,
    )


@dataclass(frozen=True)
class ExtractConfig(Config):
    """How to run an extraction; nothing here changes what the embeddings mean.

    Examples
    --------
    >>> ExtractConfig(unfreeze_layers=2).flip  # tokens for the last two blocks, no mirror images
    False
    """

    batch_size: int | None = option(
        None,
        "Images per forward pass; they become fewer where the device's memory is short.",
        shown="8 on a CPU, 256 on a GPU",
        check=at_least(1),
    )
    compile: bool = option(
        False,
        "Compile the encoder before the first image, by torch.compile, which needs a C++ compiler. "
        "It takes half a minute or more, so it pays for many images only; features differ from "
        "those computed without it by rounding.",
    )
    num_workers: int | None = option(
        None,
        "Number of decoding processes; 0 decodes in a thread.",
        shown="on a CPU one for every fourth core, else one per core, at most 16",
        check=at_least(0),
    )
    flip: bool = option(False, "Also embed each image's mirror image, as a second view.")
    unfreeze_layers: int | None = option(
        None,
        "With --tokens: number of last blocks that will be fine-tuned, whose input is cached.",
        shown=str(FinetuneConfig.unfreeze_layers),
        check=at_least(1),
    )
    tokens_dtype: str = option(
        "float16",
        "With --tokens: number format in which they are kept. float16 rounds them to 11 bits, "
        "bfloat16 to 8 without any limit of size; float32 keeps them exactly and takes twice the "
        "space.",
        choices=TOKENS_DTYPES,
    )
    max_failures: int | None = option(
        None,
        "Largest number of images that may fail before the extraction stops.",
        shown="1 % of the images, at least 100",
        check=at_least(0),
    )
    part: tuple[int, int] | None = option(
        None,
        "Extract one of N parts, such as 2/3, for merge to join.",
        shown="all",
        separator="/",
    )
    recheck_images: bool = option(
        True, "When continuing, look for image files that have changed since."
    )

    def _find_problems(self) -> Iterator[tuple[str, str]]:
        yield from super()._find_problems()
        part = self.part
        if part is not None and not (len(part) == 2 and 1 <= part[0] <= part[1]):
            yield "part", f"must be one of 1/N, 2/N ... N/N, not {'/'.join(map(str, part))}"

    def tolerated_failures(self, n_images: int) -> int:
        """Failed rows with which an extraction of `n_images` still counts as a success."""
        return max(100, n_images // 100) if self.max_failures is None else self.max_failures


@dataclass(frozen=True)
class VerifyConfig(Config):
    """How to check a store."""

    n_sampled: int = option(
        32, "With --images: number of images to encode again.", flag="--sample", check=at_least(0)
    )
    seed: int = option(0, "With --images: seed that chooses the sample.", check=at_least(0))


# -- judging and using --------------------------------------------------------------------


@dataclass(frozen=True)
class CompareConfig(Config):
    """How differences between runs are resampled."""

    n_resamples: int = option(
        2000,
        "Number of bootstrap resamples. Patients are resampled; studies, if the data set does not "
        "identify patients.",
        flag="--resamples",
        check=at_least(2),
    )
    seed: int = option(0, "Seed of the bootstrap.", check=at_least(0))


@dataclass(frozen=True)
class EvaluateConfig(CompareConfig):
    """How a run's predictions are read and scored."""

    n_resamples: int = option(
        CompareConfig.n_resamples,
        "Number of bootstrap resamples; 0 leaves out the intervals. Patients are resampled; "
        "studies, if the data set does not identify patients.",
        flag="--resamples",
        check=at_least(0),
    )
    threshold_rule: str | None = option(
        None,
        "Choose the thresholds anew on out-of-fold predictions, by a rule such as "
        f"{', '.join(THRESHOLD_RULES)}.",
        shown="as stored",
    )
    calibration: Calibration | None = option(
        None,
        f"Calibrate the probabilities anew on out-of-fold predictions: {_CALIBRATIONS}",
        shown="as stored",
    )
    min_positives: int | None = option(
        None,
        "Choose the thresholds anew, where a finding has so many positive training patients (or "
        "studies, where patients are unknown).",
        shown="as stored",
        check=at_least(0),
    )


def parse_relations(relations: str) -> tuple[str, ...]:
    """Split ``"same,broader"`` into its relations.

    Raises
    ------
    ConfigError
        One of them is none.
    """
    names = tuple(name.strip() for name in relations.split(","))
    if unknown := [name for name in names if name not in RELATIONS]:
        problem = f"takes {', '.join(RELATIONS)}, with commas between, not {unknown[0]!r}"
        raise ConfigError(problems=[("relations", problem)])
    return names


@dataclass(frozen=True)
class ExternalConfig(Config):
    """How a run is tested on another data set."""

    relations: str = option(
        RELATIONS[0],
        "With --store: which findings of the other data set are scored, by what they hold "
        f"compared with the run's: {', '.join(RELATIONS)}, with commas between.",
    )

    def _find_problems(self) -> Iterator[tuple[str, str]]:
        yield from super()._find_problems()
        try:
            parse_relations(str(self.relations))
        except ConfigError as error:
            yield from error.problems


@dataclass(frozen=True)
class AuditConfig(Config):
    """How to look for leaks, duplicates and images that do not belong."""

    closeness: float = option(
        0.1,
        "Two images are compared as pictures if their embeddings lie closer together than this "
        "share of the usual distance.",
        check=_POSITIVE_SHARE,
    )
    n_jobs: int = option(-1, "Number of decoding processes; -1 uses one per core.", flag="--jobs")
    n_repeats: int = option(
        5,
        "With --leakage: number of trainings whose results are averaged.",
        flag="--repeats",
        check=at_least(1),
    )


@dataclass(frozen=True)
class BrowseConfig(Config):
    """How embeddings become a map."""

    method: MapMethod = option(
        "pca",
        "How embeddings are placed on the map: by their first two principal components, or by UMAP "
        "(which needs the extra umap).",
    )


@dataclass(frozen=True)
class SimilarConfig(Config):
    """How many neighbours of an image are looked for, and among which images."""

    count: int = option(10, "Number of neighbours.", check=at_least(1))
    same_projection: bool = option(
        False, "Look only among images of the projection that IMAGE has in the store."
    )


@dataclass(frozen=True)
class ExplainConfig(Config):
    """How far a finding is followed back into the encoder."""

    n_blocks: int | None = option(
        None,
        "Number of transformer blocks, counted from the last, through which a finding is followed "
        "back.",
        flag="--blocks",
        shown="the blocks that were fine-tuned; of a frozen run, the last two",
        check=at_least(1),
    )


@dataclass(frozen=True)
class CardConfig(Config):
    """What the model card states, as identifiers of the Hugging Face Hub."""

    license_id: str = option(
        "unknown",
        "License named in the model card, as the Hugging Face Hub spells it, such as apache-2.0.",
        flag="--license",
    )
    dataset_id: str = option(
        "unknown",
        "Data set named in the model card, as the Hugging Face Hub spells it: ORG/NAME.",
        flag="--dataset",
    )


@dataclass(frozen=True)
class DemoConfig(Config):
    """How large the demonstration is."""

    n_studies: int = option(
        450, "Number of phantom studies to draw.", flag="--studies", check=at_least(1)
    )
    seed: int = option(0, "Seed of the phantoms and the training.", check=at_least(0))


def _document(config: type[Config]) -> None:
    """Append the options to the docstring, for whoever asks help() in a notebook."""
    lines = ["", "", "Parameters", "----------"]
    for of in fields(config):  # type: ignore[arg-type]  # subclasses are dataclasses
        lines += [of.name, f"    {option_of(of).help}"]
    config.__doc__ = (config.__doc__ or "").rstrip() + "\n".join(lines)


for _config in [*vars().values()]:
    if isinstance(_config, type) and issubclass(_config, Config) and _config is not Config:
        _document(_config)
