"""An evaluated run -> the methods section of a paper, and its results in a sentence each.

Every statement follows from what the run recorded. What it did not record, and a reader of the
paper has to know, is a blank in square brackets that says what belongs there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import pandas as pd

from cxr_cache.common.wording import count, list_names, plural
from cxr_cache.config import (
    OF_THE_MACHINE,
    Augmentation,
    FinetuneConfig,
    Recipe,
    TrainConfig,
    parse_threshold_rule,
)
from cxr_cache.datasets.cohort import UNITS
from cxr_cache.datasets.collections.catalogue import FORMS
from cxr_cache.datasets.splits import OUTER_FOLD
from cxr_cache.errors import RunError
from cxr_cache.evaluation.evaluate import (
    FEW_POSITIVES,
    NESTED,
    NESTED_INTERVALS,
    NESTED_MODEL,
    describe_sample,
    describe_strength,
)
from cxr_cache.metrics.operating_point import PRIOR_POSITIVES
from cxr_cache.models.run import Run
from cxr_cache.report import facts as known
from cxr_cache.report import phrases
from cxr_cache.report.model_card import UNKNOWN, read_card
from cxr_cache.report.views import Record, RunView, read_external_view, read_view

MAX_NAMES: Final = 20
"""Findings that a sentence names; of more, it refers to a table."""

_CONFIGS: Final = {"train": TrainConfig, "finetune": FinetuneConfig}
_TITLES: Final = {
    "indiana": "the Indiana University chest X-ray collection",
    "openi": "the Indiana University chest X-ray collection (Open-i)",
    **{form.format: form.title for form in reversed(FORMS)},
}
"""Published data sets by the names of their readers."""
_LEFT_OUT: Final = (*OF_THE_MACHINE, "precision", "source", "half")
"""Options that a paper can do without."""
_DESCRIBED: Final = (
    *("epochs", "n_folds", "test_fraction", "split", "split_by", "level", "final", "seed"),
    *("batch_size", "learning_rate", "weight_decay", "max_grad_norm", "schedule", "patience"),
    *("early_stopping", "loss", "alpha", "gamma", "hidden", "dropout", "norm", "input_norm"),
    *("threshold_rule", "min_positives", "calibration", "select_by", "within_one_se"),
    *(
        "features",
        "flip",
        "baseline",
        "protocol",
        "n_outer_folds",
        "unfreeze_layers",
        "head_learning_rate",
        "warmup_steps",
    ),
    *("layer_decay", "ema_decay", "mixup", "patch_dropout", "accumulate", "augmentation"),
)
"""Options of which a sentence speaks; any other that was set is listed by its name."""


def describe_methods(run: Run, *, external: str | Path | None = None) -> str:
    """Write the methods section of a paper on a run, and the figures of its test.

    Parameters
    ----------
    run
        A finished run that has been evaluated.
    external
        Folder that ``cxr-cache evaluate RUN --store OTHER.h5 --out DIR`` wrote: the test on that
        data set is described too.

    Returns
    -------
    str
        Markdown. What the run does not know stands in square brackets, to be filled in.

    Raises
    ------
    RunError
        The run was not evaluated, lacks a table, or was trained with an option that this version
        does not know; or `external` is no test of this run.

    Examples
    --------
    >>> print(describe_methods(Run.open("runs/first")))  # doctest: +SKIP
    ## Methods
    ...
    """
    facts = _Facts(run, read_view(run))
    methods = [
        *(_data, _split, _encoders, _model, _training, _selection, _decisions, _statistics),
        _software,
    ]
    paragraphs = [" ".join(filter(None, write(facts))) for write in methods]
    where = "images of all outer folds" if run.is_nested else "test set"
    results = [" ".join(_results(facts.view.metrics, facts.view.row, where))]
    if external is not None:
        test = _open_external(external, run)
        paragraphs.insert(-1, " ".join(_external_test(test)))
        results.append(" ".join(_results(test.metrics, test.row, "external test set")))
    text = "\n\n".join(["## Methods", *paragraphs, "## Results", *results])
    cited = [key for key in phrases.REFERENCES if f"[{key}]" in text]
    references = [f"* [{key}] {phrases.REFERENCES[key]}" for key in cited]
    limits = [f"* {warning}" for warning in facts.config["warnings"]]
    if facts.config["random_encoder"]:
        limits.insert(0, "* The encoder's weights are random: figures say nothing of radiographs.")
    parts = [text, "## References", "\n".join(references)]
    if limits:
        parts += ["## To be stated as limits", "\n".join(limits)]
    return "\n\n".join(parts) + "\n"


def find_blanks(text: str) -> list[str]:
    """List what is left to be filled in: the words in square brackets that cite nothing."""
    inside = dict.fromkeys(re.findall(r"\[([^\]]+)\]", text))
    return [words for words in inside if words not in phrases.REFERENCES]


@dataclass(frozen=True)
class _Facts:
    """A run as a paper describes it."""

    run: Run
    view: RunView

    @property
    def config(self) -> dict[str, Any]:
        return self.view.config

    @cached_property
    def recipe(self) -> TrainConfig | FinetuneConfig:
        """What it was trained with; options that came later have what was done before."""
        kind: type[TrainConfig | FinetuneConfig] = _CONFIGS[self.config["kind"]]
        recorded = {"split": "new", **kind.earlier, **self.config[self.config["kind"]]}
        if unknown := set(recorded) - {of.name for of in fields(kind)}:
            raise RunError(
                f"{self.run.path} was trained with options that this version of cxr-cache does "
                f"not know: {list_names(sorted(unknown))}. Use the version that trained it."
            )
        if "augmentation" in recorded:
            recorded["augmentation"] = Augmentation(**recorded["augmentation"])
        return kind(**recorded)

    @cached_property
    def tuned(self) -> FinetuneConfig | None:
        """The recipe of a fine-tuned run; None of a frozen one."""
        return self.recipe if isinstance(self.recipe, FinetuneConfig) else None

    @cached_property
    def splits(self) -> pd.DataFrame:
        """Which side each image is on; of a given split also how it was given."""
        return self.run.splits

    @cached_property
    def patients(self) -> pd.Series:
        """Patient of every row that has a prediction, by its side; blank where unknown."""
        table = self.run.predictions
        if "patient_id" not in table:
            return pd.Series([""] * len(table), index=table["split"], dtype=str)
        patients: pd.Series = table.set_index("split")["patient_id"]
        return patients

    @property
    def unit(self) -> str:
        """What is kept whole and resampled: patient, study, or either."""
        return str(self.view.metrics["bootstrap"]["unit"])

    @property
    def units(self) -> str:
        return UNITS[self.unit]  # type: ignore[index]  # one of three

    def sample(self, side: str) -> str:
        """How many images, studies and patients are on a side."""
        metrics, patients = self.view.metrics, self.patients
        parts = [
            count(metrics[f"n_{side}_images"], "image"),
            count(metrics[f"n_{side}_studies"], "study"),
        ]
        n_patients = patients.loc[[side]][lambda ids: ids != ""].nunique()
        if n_patients:
            parts.append(count(n_patients, "patient"))
        return " of ".join(parts)


# -- methods: each function gives the sentences of one paragraph ----------------------------------


def _data(facts: _Facts) -> Iterator[str]:
    config = facts.config
    reading = config.get("reading") or {}
    named = read_card(facts.run).get("dataset_id", UNKNOWN)
    name = named if named != UNKNOWN else "[name, version and reference of the data set]"
    yield f"Images and labels were those of {name}{_form(reading.get('format', ''))}."
    if tables := config["store"].get("cohort"):
        digests = [f"{table}, SHA-256 {digest}" for table, digest in tables.items()]
        yield f"They were listed in {'; '.join(digests)}."
    if labels := config.get("labels"):
        yield f"Labels were taken from {labels['path']} (SHA-256 {labels['sha256']}) instead."
    yield "[Sites, period, inclusion criteria, ethics approval.]"
    yield known.exclusions(facts.view) or "[Images that were left out, and why.]"
    yield from _people(facts.view.metrics.get("demographics") or {})
    findings = config["findings"]
    yield f"{_name_or_count(findings)} {'was' if len(findings) == 1 else 'were'} labelled."
    yield known.annotators(facts.view) or "[How the labels were made, by whom and from what.]"
    if policy := (config.get("label_codes") or reading).get("policy"):
        yield f"Label codes were read so: {policy}."
    missing = facts.run.targets[list(findings)].isna().to_numpy().mean()
    if missing:
        yield (
            f"{missing:.1%} of the labels were missing; they took part neither in training nor in "
            "any figure."
        )


def _people(demographics: Record) -> Iterator[str]:
    """Age and sex of either side, as far as the data set tells them."""
    sides = {"train": "training set", "test": "test set"}
    of_side = {name: demographics.get(side) or {} for side, name in sides.items()}
    ages = [
        f"{age['median']:g} years (quartiles {age['quartiles'][0]:g} to {age['quartiles'][1]:g}) "
        f"in the {name}"
        for name, people in of_side.items()
        if (age := people.get("age")) and age["n_studies"]
    ]
    sexes = [
        f"{', '.join(f'{n:,} {value}' for value, n in sex['n'].items())} among the "
        f"{UNITS[sex['unit']]} of the {name}"
        for name, people in of_side.items()
        if (sex := people.get("sex")) and any(sex["n"].values())
    ]
    yield f"The median age was {' and '.join(ages)}." if ages else "[Age.]"
    yield f"Sex: {'; '.join(sexes)}." if sexes else "[Sex.]"


def _form(name: str) -> str:
    """In whose form tables were read, which need not be that data set itself."""
    return f", read in the form of {_TITLES[name]}" if name in _TITLES else ""


def _name_or_count(findings: list[str]) -> str:
    """Names of findings, or how many there are and that a table names them."""
    if len(findings) <= MAX_NAMES:
        return list_names(findings)
    return f"{len(findings)} findings (Table [number])"


def _split(facts: _Facts) -> Iterator[str]:
    recipe, split, splits = facts.recipe, facts.config.get("split", {}), facts.splits
    whose = split.get("whose", "")
    if facts.run.is_nested:
        yield from _outer_folds(facts)
        return
    is_given = "given_split" in splits and splits["given_split"].isin(("val", "test")).any()
    if whose and (is_given or OUTER_FOLD in whose):
        yield f"The test set was the one given by {whose}: {facts.sample('test')}."
    else:
        how = f"in whole {facts.units}, balanced so that every finding keeps its prevalence"
        if recipe.split_by == "image":
            how = "image by image"
        yield (
            f"A test set of {recipe.test_fraction:.0%} was drawn at random {how} (seed "
            f"{recipe.seed}): {facts.sample('test')}."
        )
    yield f"The training set had {facts.sample('train')}."
    if n_shared := split.get("n_shared"):
        units = split["unit"] if n_shared == 1 else UNITS[split["unit"]]
        yield f"{n_shared:,} {units} had images in both sets."
    elif "n_shared" in split:
        yield f"No {split['unit']} had images in both sets."
    n_unknown = int((facts.patients == "").sum())
    if n_unknown == len(facts.patients):
        yield "The data set does not name patients, so whole studies stood for them."
    elif n_unknown:
        yield f"The patients of {count(n_unknown, facts.view.row)} were not known."
    n_folds = recipe.n_folds
    if whose and "given_fold" in splits and splits["given_fold"].notna().any():
        yield f"The training set was divided into the {n_folds} folds given by {whose}."
    else:
        kept = "images" if recipe.split_by == "image" else f"whole {facts.units}"
        yield f"The training set was divided into {n_folds} folds of {kept}."


def _outer_folds(facts: _Facts) -> Iterator[str]:
    """How a nested cross-validation divides the data."""
    recipe, unit = facts.recipe, facts.config["split"]["unit"]
    yield (
        f"The recipe was tested by a nested cross-validation [Varma 2006]: {facts.sample('train')} "
        f"were dealt into {len(facts.view.outer_folds)} outer folds of whole {facts.units}, "
        f"balanced so that every finding keeps its prevalence (seed {recipe.seed}). No {unit} had "
        "images in two of them."
    )
    yield (
        f"For each outer fold, the others were divided into {recipe.n_folds} folds, in which all "
        "choices below were made; the final model that followed was tested once, on the outer fold."
    )
    yield f"{NESTED} {NESTED_MODEL}"


def _encoders(facts: _Facts) -> Iterator[str]:
    for store in facts.view.stores:
        yield from _encoder(store["encoder"])
    if len(facts.view.stores) > 1:
        yield "The features of these encoders stood side by side, each normalised by itself."
    if not facts.config["random_encoder"] and facts.tuned is None:
        yield (
            "The encoder was not trained."
            if len(facts.view.stores) == 1
            else "No encoder was trained."
        )


def _encoder(encoder: Mapping[str, Any]) -> Iterator[str]:
    digest = f"SHA-256 {encoder['weights_sha256']}"
    if encoder.get("imported"):
        name = str(encoder["name"]).removeprefix("imported:")
        yield (
            f"Features of {encoder['embedding_width']} numbers per image came from {name} "
            f"({digest}). [Encoder, weights and preprocessing by which they were computed.]"
        )
        return
    revision = f"revision {encoder['revision']}, " if encoder.get("revision") else ""
    made = " with random weights" if encoder.get("is_random") else ""
    shape = [
        f"{encoder[key]} {what}"
        for key, what in (("n_blocks", "transformer blocks"), ("embedding_width", "outputs"))
        if encoder.get(key)
    ]
    of_shape = f", {' and '.join(shape)}" if shape else ""
    name = str(encoder["name"])
    if name.startswith(("local-dir:", "local-file:")):  # a path says nothing to a reader
        name = f"[name and reference of the encoder in {Path(name.split('?')[0]).name}]"
    yield f"The encoder was {name}{made} ({revision}vision weights {digest}{of_shape})."
    if rule := encoder.get("preprocessing"):
        size, larger = rule["image_size_px"], rule.get("resize_px")
        resized = phrases.RESIZED[rule["resize"]].format(larger or size, size)
        mean, std = (", ".join(f"{x:.4g}" for x in rule[name]) for name in ("mean", "std"))
        yield (
            f"Each image was {resized} ({rule['interpolation']} interpolation), and normalised "
            f"with mean ({mean}) and standard deviation ({std})."
        )
        if rule.get("bits_stored"):
            yield f"Grey values were taken to have {rule['bits_stored']} bits."
    if precision := encoder.get("precision"):
        yield f"Features were computed in {precision}."
    yield from encoder.get("notes", ())


def _model(facts: _Facts) -> Iterator[str]:
    recipe, view = facts.recipe, facts.view
    what = phrases.FEATURES[getattr(recipe, "features", "projected")]
    if facts.tuned is not None:
        n = facts.tuned.unfreeze_layers
        yield (
            f"The last {count(n, 'block')} of the encoder {'was' if n == 1 else 'were'} trained "
            f"together with a head on the {what} of each image; everything before stayed as it was."
        )
        if start := facts.config.get("from_run"):
            yield f"The heads began as those of the frozen run {start['path']}, fold by fold."
    else:
        yield f"A head was trained on the {what} of each image."
    widths = " and ".join(map(str, recipe.hidden))
    hidden = (
        f"hidden layers of {widths} units, each followed by {recipe.norm} normalisation, a "
        f"rectifier and dropout of {recipe.dropout:g}"
        if recipe.hidden
        else "no hidden layer"
    )
    yield f"In front of the head it was {phrases.INPUTS[recipe.input_norm]}."
    yield f"The head ({view.head}) had {hidden}, and one sigmoid output for each finding."
    if recipe.level == "study":
        yield (
            "Each study got one prediction: the mean of the features of its frontal images stood "
            "beside that of its lateral ones, with two numbers that say which of them there were."
        )
    yield from _views(facts)


def _views(facts: _Facts) -> Iterator[str]:
    """Whether mirror images and changed pixels took part."""
    if (tuned := facts.tuned) is None:
        n_views = facts.config.get("n_views")
        if n_views is None and facts.recipe.flip:
            yield "[Whether mirror images were trained on: those of stores made with --flip were.]"
        elif n_views is not None and n_views > 1:
            yield "Mirror images were trained on too, and not used for predictions."
        return
    source = {"tokens": "cached tokens, the input of the first of these blocks", "images": "images"}
    yield f"Training read {source.get(tuned.source, tuned.source)}."
    if tuned.flip:
        yield "Half of the images were mirrored at random while training."
    if tuned.augmentation.changes_pixels:
        named = vars(tuned.augmentation).items()
        changes = [f"{name.replace('_', ' ')} {value:g}" for name, value in named if value]
        yield f"Pixels were changed at random while training: {', '.join(changes)}."


def _training(facts: _Facts) -> Iterator[str]:
    recipe, tuned = facts.recipe, facts.tuned
    rate = f"a learning rate of {recipe.learning_rate:g}"
    if tuned is not None:
        rate = f"learning rates of {recipe.learning_rate:g} (blocks) and "
        rate += f"{tuned.head_learning_rate:g} (head)"
    clip = recipe.max_grad_norm
    norm = "without a limit on the gradient" if clip is None else f"gradients of norm ≤ {clip:g}"
    of = plural(recipe.level) if recipe.level == "study" else "images"
    yield (
        f"Training used AdamW [Loshchilov 2019] with {rate}, a weight decay of "
        f"{recipe.weight_decay:g}, {norm} and batches of {recipe.batch_size} {of}."
    )
    loss = phrases.LOSSES[recipe.loss].format(gamma=recipe.gamma, alpha=recipe.alpha)
    schedule = phrases.SCHEDULES[recipe.schedule].format(patience=recipe.patience)
    yield f"The loss was {loss}. The learning rate {schedule}."
    if tuned is not None:
        yield from _fine_tuning(tuned)
    yield from _further(recipe)
    yield f"The seed was {recipe.seed}."


def _fine_tuning(tuned: FinetuneConfig) -> Iterator[str]:
    if tuned.warmup_steps:
        yield f"Both rates rose from zero over the first {tuned.warmup_steps} steps."
    if tuned.layer_decay != 1:
        yield f"From each block to the one before, the rate shrank by {tuned.layer_decay:g}."
    if tuned.ema_decay:
        yield (
            "An exponential moving average of the weights, with a decay of "
            f"{tuned.ema_decay:g} per step, was scored and saved."
        )
    if tuned.mixup:
        yield f"Tokens of two images were mixed [Zhang 2018] with α = {tuned.mixup:g}."
    if tuned.patch_dropout is None:
        yield "[Share of patches that was left out while training.]"
    elif tuned.patch_dropout:
        share = f"{tuned.patch_dropout:.0%}"
        yield f"{share} of the patches were left out of each training batch [Liu 2023]."
    if tuned.accumulate > 1:
        yield f"Gradients of {tuned.accumulate} batches were averaged into one step."


def _further(recipe: Recipe) -> Iterator[str]:
    """Options that no sentence speaks of, where they are not the default."""
    known = {*_DESCRIBED, *_LEFT_OUT}
    listed = [
        f"{of.name.replace('_', ' ')} {getattr(recipe, of.name)}"
        for of in fields(recipe)
        if of.name not in known and getattr(recipe, of.name) != of.default
    ]
    if listed:
        yield f"Further options: {', '.join(listed)}."


def _selection(facts: _Facts) -> Iterator[str]:
    recipe, view = facts.recipe, facts.view
    candidates = ", ".join(map(str, recipe.epochs))
    measure = facts.config.get("search_measure", "macro AUROC")
    chosen = view.final_epochs
    if view.outer_folds:
        of_folds = ", ".join(str(fold["chosen_epochs"]) for fold in view.outer_folds)
        chosen = f"{of_folds} in the outer folds and {chosen} for the model trained on all data"
    if view.n_folds > 1 and len(recipe.epochs) > 1:
        rule = "the best mean over the held-out folds"
        if recipe.within_one_se:
            rule = "the smallest within one standard error of the best mean over the held-out folds"
        yield (
            f"The number of epochs was chosen among {candidates} by {measure}: {rule}. "
            f"The choice was {chosen}."
        )
    else:
        yield f"Training took {chosen} epochs, without a search."
    if recipe.early_stopping is not None:
        yield (
            f"A training ended early after {count(recipe.early_stopping, 'epoch')} without a "
            "better loss on the held-out fold."
        )
    yield f"{phrases.FINALS[recipe.final].format(n_folds=view.n_folds)}."
    if (recipe.final, recipe.schedule) == ("refit", "plateau"):
        yield "Its learning rate in each epoch was the geometric mean of those of the folds."
    if repeats := facts.config.get("n_repeats"):
        yield f"Training was repeated with {repeats} seeds on the same split."
    if (logistic := view.metrics.get("logistic")) is not None:
        yield (
            "An L2-regularised logistic regression on the same features and folds served as a "
            f"baseline (C = {describe_strength(logistic)}, chosen on the held-out folds)."
        )


def _decisions(facts: _Facts) -> Iterator[str]:
    """How probabilities became calls; as `evaluate` may have chosen since the training."""
    metrics = facts.view.metrics
    method = (metrics.get("calibration") or {}).get("method", "none")
    name, target = parse_threshold_rule(metrics.get("threshold_rule", "f1"))
    yield f"{phrases.CALIBRATIONS[method]}."
    yield f"The threshold of each finding {phrases.RULES[name].format(target=target)}."
    if method == "platt-shrunk":
        yield (
            "Thresholds of rare findings were drawn towards what the calibrated probabilities lead "
            f"one to expect, which counted as much as {PRIOR_POSITIVES:g} positive {facts.units}."
        )
    both = "Thresholds" if method == "none" else "Calibration and thresholds"
    if facts.run.is_nested:
        yield (
            f"{both} were chosen, for each outer fold, on out-of-fold predictions of the others; "
            "the outer fold took no part in any choice."
        )
    else:
        yield (
            f"{both} were chosen on out-of-fold predictions of the training set; the test set took "
            "no part in any choice."
        )
    if least := metrics.get("min_positives"):
        yield (
            f"Findings with fewer than {least} positive training {facts.units} got no threshold: "
            "they were ranked, and count in no figure at thresholds."
        )


def _statistics(facts: _Facts) -> Iterator[str]:
    metrics = facts.view.metrics
    bootstrap = metrics["bootstrap"]
    yield (
        "Ranking was measured by the area under the receiver operating characteristic curve "
        "(AUROC) and by average precision, decisions by sensitivity and specificity, and "
        "probabilities by the Brier score; macro figures are means over the findings for which "
        "they are defined."
    )
    if facts.view.row == "image":
        yield "By study, the probabilities of a study's images were averaged."
    if bootstrap["n_resamples"]:
        yield (
            f"Intervals are {bootstrap['level']:.0%} intervals from {bootstrap['n_resamples']:,} "
            f"resamples of whole {facts.units} [Rubin 1981] (seed {bootstrap['seed']}): "
            f"{bootstrap['interval']}."
        )
    else:
        yield "No intervals were computed."
    if facts.run.is_nested:
        yield NESTED_INTERVALS.replace("(Bengio and Grandvalet 2004)", "[Bengio 2004]")
    if facts.view.reads is not None:
        yield facts.view.reads.to_text()


def _software(facts: _Facts) -> Iterator[str]:
    versions = facts.config.get("versions", {})
    named = [f"{'Python' if name == 'python' else name} {of}" for name, of in versions.items()]
    yield f"Software: {', '.join(named) if named else '[versions]'}."
    machine = facts.config.get("machine", {})
    parts = [str(machine[name]) for name in ("gpu", "processor") if machine.get(name)]
    yield f"Training ran on {' and '.join(parts)}." if parts else "[Hardware.]"


def _open_external(folder: str | Path, run: Run) -> RunView:
    """The test on another data set that a folder holds, which must be one of this run."""
    test = Run(Path(folder), run.config)
    is_there = (test.path / "metrics.json").is_file()
    external = test.read_metrics().get("external") if is_there else None
    if external is None:
        raise RunError(
            f"{folder} holds no test on another data set. `cxr-cache evaluate {run.path} --store "
            "OTHER.h5 --out DIR` makes one."
        )
    if (theirs := Path(external["run"])).name != run.path.resolve().name:
        raise RunError(f"{folder} is a test of the run {theirs}, not of {run.path}.")
    return read_external_view(test)


def _external_test(view: RunView) -> Iterator[str]:
    external: Record = view.external or {}
    form = _form(external.get("data_set", ""))
    yield (
        "The model was tested, with its calibration and thresholds unchanged, on "
        f"{describe_sample(view.metrics, 'test')} of [name, version and reference of the external "
        f"data set]{form}."
    )
    yield (
        "Findings were matched by their names and by what they hold (scored: "
        f"{list_names(external['relations'])}); {view.metrics['n_findings_scored']} of "
        f"{count(view.metrics['n_findings'], 'finding')} could be scored."
    )
    yield from external.get("warnings", ())


# -- results --------------------------------------------------------------------------------------


def _results(metrics: Record, row: str, where: str) -> Iterator[str]:
    test = metrics["test"]
    n_scored, of = metrics["n_findings_scored"], count(metrics["n_findings"], "finding")
    if n_scored < metrics["n_findings"]:
        of = f"{n_scored} of {of}"
    sentence = (
        f"On the {where} ({describe_sample(metrics, 'test')}), the macro AUROC over {of} was "
    )
    sentence += _figure(test, "macro_auroc", beside="guessing, 0.500")
    if row == "image":
        sentence += f", and {_figure(metrics['test_by_study'], 'macro_auroc')} by study"
    yield f"{sentence}."
    chance = f"guessing, {_figure(test, 'macro_ap_of_chance')}"
    yield f"Macro average precision was {_figure(test, 'macro_ap', beside=chance)}."
    n_decided = test["macro_sensitivity"].get("n_findings")
    if n_decided:
        yield (
            f"At the thresholds, macro sensitivity was {_figure(test, 'macro_sensitivity')} and "
            f"macro specificity {_figure(test, 'macro_specificity')}, over "
            f"{count(n_decided, 'finding')}."
        )
    constant = f"stating each prevalence, {_figure(test, 'macro_brier_of_prevalence')}"
    yield f"The macro Brier score was {_figure(test, 'macro_brier', beside=constant)}."
    if (logistic := metrics.get("logistic")) is not None:
        yield (
            f"The logistic regression had a macro AUROC of {_figure(logistic, 'macro_auroc')}; the "
            f"model minus it: {_figure(logistic, 'difference', '+.3f')}."
        )
    if recipe := metrics.get("recipe"):
        yield (
            f"Over {recipe['n_trainings']} trainings the macro AUROC was "
            f"{_figure(recipe, 'macro_auroc')}, with a standard deviation of "
            f"{recipe['macro_auroc']['std']:.3f} between trainings."
        )
    yield from _unscored(metrics)


def _unscored(metrics: Record) -> Iterator[str]:
    """Findings of which figures say little or nothing."""
    lists = {
        "findings_undefined": "Not scored, without a positive or a negative in the test: {names}.",
        "findings_undefined_in_some_folds": "Averaged over fewer outer folds, since the others had "
        "no positive or no negative, were {names}.",
        "findings_with_few_positives": "In fewer than {few} positive test {units}: {names}.",
        "findings_undecided": "Ranked only, without a threshold, were {names}.",
    }
    for name, sentence in lists.items():
        if found := metrics.get(name):
            units = UNITS[metrics["bootstrap"]["unit"]]
            yield sentence.format(names=_name_or_count(found), units=units, few=FEW_POSITIVES)


def _figure(figures: Mapping[str, Any], name: str, form: str = ".3f", beside: str = "") -> str:
    """``0.722 (95% CI 0.701 to 0.741; guessing, 0.500)``; in words, what there is not."""
    entry = figures.get(name) or {}
    value, low, high = (entry.get(key) for key in ("value", "low", "high"))
    if value is None:
        return "undefined"
    inside = [beside] if beside else []
    if "low" in entry:
        is_there = low is not None and high is not None
        interval = f"95% CI {low:{form}} to {high:{form}}" if is_there else "no interval"
        inside.insert(0, interval)
    return f"{value:{form}}" + (f" ({'; '.join(inside)})" if inside else "")
