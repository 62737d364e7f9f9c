"""What a run knows of itself, one fact at a time, in sentences for the checklists of a paper.

A fact is None where the run does not know it: nothing here is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from cxr_cache.common.wording import count, list_names, plural
from cxr_cache.datasets.cohort import UNITS
from cxr_cache.datasets.collections.labelling import say_whose_labels
from cxr_cache.datasets.labels import FINDINGS
from cxr_cache.evaluation.evaluate import (
    LEVEL,
    NESTED,
    NESTED_INTERVALS,
    NESTED_MODEL,
    describe_sample,
)
from cxr_cache.evaluation.figures import MEASURES
from cxr_cache.report.composition import count_line, tabulate_people
from cxr_cache.report.views import RunView

Fact = Callable[[RunView], str | None]


def _interval(entry: Mapping[str, Any], form: str = "{:.3f}") -> str:
    if entry.get("value") is None:
        return "undefined"
    value = form.format(entry["value"])
    if "low" not in entry:
        return value
    if entry["low"] is None:
        return f"{value} (no interval)"
    return f"{value} ({form.format(entry['low'])} to {form.format(entry['high'])})"


def _option(view: RunView, name: str) -> Any:
    return view.options.get(name)


# -- data ------------------------------------------------------------------------------------------


def data_files(view: RunView) -> str | None:
    """Name the tables that were read, by digest."""
    files = view.config["store"].get("cohort") or {}
    if not files:
        return None
    reading = view.config.get("reading") or {}
    form = f", read as {reading['format']}" if reading.get("format") else ""
    named = [f"{name} (SHA-256 {digest[:16]}...)" for name, digest in files.items()]
    return f"{list_names(named)}{form}."


def flow(view: RunView) -> str | None:
    """Say the flow of images in one sentence per step."""
    if not view.flow:
        return None
    lines = []
    for step in view.flow:
        lost = [f"{count_line(line)} lost ({line['what']})" for line in step.lost]
        lines.append("; ".join([f"{count_line(step.left)}: {step.left['what']}", *lost]))
    parts = [
        f"{line['what']} {count_line(line)}"
        for line in view.flow[-1].parts
        if line["kind"] in ("part", "shared")
    ]
    return ". ".join([*lines, f"Of these: {'; '.join(parts)}"]) + "."


def exclusions(view: RunView) -> str | None:
    """Say what images were lost to."""
    if not view.flow:
        return None
    lost = [f"{count_line(line)}: {line['what']}" for step in view.flow for line in step.lost]
    return f"Left out: {'; '.join(lost)}." if lost else "No image of the data set was left out."


def preprocessing(view: RunView) -> str | None:
    """Say how images are prepared; nothing is known of imported features."""
    known = [store["encoder"].get("preprocessing") for store in view.stores]
    if not all(known):
        return None
    texts = [
        ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in each.items() if value)
        for each in known
        if each
    ]
    return f"Images are decoded, resized and normalised as the encoder's own: {'; '.join(texts)}."


def deidentification(view: RunView) -> str | None:
    """Say that ids of DICOM headers were hashed, where they were."""
    columns = (view.config.get("reading") or {}).get("columns", {})
    hashed = [name for name, use in columns.items() if use.endswith("as a keyed hash")]
    if not hashed:
        return None
    return f"{list_names(hashed)} of the DICOM headers were replaced by keyed hashes."


def missing_labels(view: RunView) -> str | None:
    """Say how many findings are unlabelled somewhere, and what was made of label codes."""
    labels = view.labels
    if not labels.n_findings:
        return None
    rows = plural(view.row)
    text = (
        f"Every one of the {rows} has a label for every finding."
        if not labels.n_lacking
        else f"{labels.n_lacking} of {count(labels.n_findings, 'finding')} are unlabelled in some "
        f"{rows}; unlabelled cells count neither in the loss nor in a figure (label_counts.csv)."
    )
    policy = (view.config.get("label_codes") or {}).get("policy")
    return f"{text} Label codes: {policy}." if policy else text


def label_source(view: RunView) -> str | None:
    """Say where labels come from, as far as tables tell."""
    labels = view.config.get("labels")
    if labels:
        return f"Labels are those of {labels['path']} (SHA-256 {labels['sha256'][:16]}...)."
    columns = (view.config.get("reading") or {}).get("columns", {})
    tags = [name for name, use in columns.items() if use == "list of tags"]
    if tags and tuple(view.config["findings"]) == FINDINGS:
        return (
            f"35 findings are groups of tags that reports were coded with ({tags[0]}), by the rule "
            "in cxr_cache/datasets/findings35.json."
        )
    used = [name for name, use in columns.items() if use in ("finding", "findings")]
    return f"Labels are those of the data set's table: {list_names(used, 5)}." if used else None


def annotators(view: RunView) -> str | None:
    """Say who made the labels of a published data set; nothing is known of a table of one's own."""
    known = view.labelling
    return None if known == say_whose_labels("") else known


def people(view: RunView) -> str | None:
    """Say age, sex and projections of either side."""
    if "demographics" not in view.metrics:
        return None
    [_, *sides], *lines = tabulate_people(view.metrics["demographics"])
    return " ".join(
        f"{line[0][:1].upper()}{line[0][1:]}: "
        + "; ".join(f"{side} {cell}" for side, cell in zip(sides, line[1:], strict=True))
        + "."
        for line in lines
    )


def outcomes(view: RunView) -> str | None:
    """Say on how many positives either side rests."""
    if "label_counts" not in view.tables:
        return None
    table = view.tables["label_counts"]
    parts = [
        f"{side}: {table[f'{side}_present'].min():,} to {table[f'{side}_present'].max():,} "
        f"{plural(view.row)} with a finding"
        for side in ("train", "test")
        if f"{side}_present" in table
    ]
    return f"{'; '.join(parts)} (label_counts.csv has every finding). {_sides(view)}"


def prevalences(view: RunView) -> str | None:
    """Say how far prevalences of test and train are apart."""
    table = view.tables.get("label_counts")
    if table is None or "train_present" not in table:
        return None
    shares = [
        table[f"{side}_present"] / (table[f"{side}_present"] + table[f"{side}_absent"])
        for side in ("train", "test")
    ]
    furthest = int((shares[0] - shares[1]).abs().to_numpy().argmax())
    train, test = (share.iloc[furthest] for share in shares)
    return (
        f"Prevalences differ most in {table['finding'].iloc[furthest]}: {train:.1%} in train, "
        f"{test:.1%} in test."
    )


def train_size(view: RunView) -> str | None:
    """Say how large the train side is."""
    return f"Train: {describe_sample(view.metrics, 'train')}."


def test_size(view: RunView) -> str | None:
    """Say how large the test is, and how narrow an interval that gives."""
    area = view.metrics["test"]["macro_auroc"]
    text = f"Test: {describe_sample(view.metrics, 'test')}"
    if area.get("low") is None:
        return f"{text}."
    return f"{text}; the interval of its macro AUROC is ±{(area['high'] - area['low']) / 2:.3f}."


def _sides(view: RunView) -> str:
    return f"{train_size(view)} Test: {describe_sample(view.metrics, 'test')}."


# -- split -----------------------------------------------------------------------------------------


def partition(view: RunView) -> str | None:
    """Say who chose the sides, and how."""
    split = view.config.get("split", {})
    folds = f"Train images are in {count(view.n_folds, 'fold')} for cross-validation."
    if whose := split.get("whose"):
        return f"The test images are those given by {whose}. {folds}"
    share, seed = _option(view, "test_fraction"), _option(view, "seed")
    if view.outer_folds:
        return (
            f"Nested cross-validation: {len(view.outer_folds)} outer folds, dealt with seed {seed} "
            "so that every finding keeps its prevalence; each was tested once, and the others were "
            f"in {count(view.n_folds, 'fold')} for every choice. {_sides(view)}"
        )
    if share is None:
        return None
    return (
        f"{share:.0%} of the data are set aside for the test, drawn with seed {seed} so that every "
        f"finding keeps its prevalence. {folds} {_sides(view)}"
    )


def disjoint(view: RunView) -> str | None:
    """Say what is never on both sides."""
    split = view.config.get("split")
    if split is None:
        return None
    units = UNITS[split["unit"]]
    if view.outer_folds:
        return f"No {split['unit']} has images on both sides of an outer fold; {units} stay whole."
    if split["n_shared"]:
        return f"{split['n_shared']:,} {units} are on both sides, so the figures are too good."
    return f"No {split['unit']} has images on both sides; whole {units} were assigned."


def same_source(view: RunView) -> str | None:
    """Say that both sides are of one data set."""
    return "Train and test are parts of the same data set, with the same labels and preprocessing."


# -- model and training ----------------------------------------------------------------------------


def model_kind(view: RunView) -> str | None:
    """Say what kind of model it is."""
    if view.config["kind"] == "finetune":
        return (
            f"Deep learning: the last {count(_option(view, 'unfreeze_layers'), 'block')} of "
            f"{view.encoders} fine-tuned with a {view.head}."
        )
    return f"Deep learning: a {view.head} on frozen {view.features} of {view.encoders}."


def architecture(view: RunView) -> str | None:
    """Say what the model looks like, with the digest of the encoder's weights."""
    hidden, digests = _option(view, "hidden"), []
    for store in view.stores:
        if digest := store["encoder"].get("weights_sha256"):
            digests.append(f"{store['encoder']['name']} (weights SHA-256 {digest[:16]}...)")
    if hidden is None:
        return model_kind(view)
    widths = list_names([str(width) for width in hidden]) or "none"
    return (
        f"{model_kind(view)} Hidden widths: {widths}; dropout {_option(view, 'dropout')}; inputs "
        f"{_option(view, 'input_norm')}-normalised; one output with a sigmoid for each of "
        f"{count(len(view.config['findings']), 'finding')}. Encoder: {list_names(digests)}."
    )


def predictors(view: RunView) -> str | None:
    """Say what the head reads."""
    widths = [str(store["encoder"].get("embedding_width", "")) for store in view.stores]
    return (
        f"The {view.features} of {view.encoders} ({' + '.join(widths)} numbers an image); none "
        "were left out."
    )


def input_scale(view: RunView) -> str | None:
    """Say how features are scaled."""
    ways = {
        "l2": "Features are scaled to unit Euclidean length.",
        "standard": "Features are standardised with mean and standard deviation of train images.",
        "none": "Features are used as the encoder gives them.",
    }
    return ways.get(str(_option(view, "input_norm")))


def initialisation(view: RunView) -> str | None:
    """Say where weights begin."""
    if view.config.get("from_run"):
        return f"Blocks begin as published, heads as those of {view.config['from_run']['path']}."
    encoder = "random, by seed" if view.config["random_encoder"] else "as loaded"
    return (
        f"Encoder: {encoder}. Head: Xavier-uniform weights and zero biases, from seed "
        f"{view.config['seed']}."
    )


def training(view: RunView) -> str | None:
    """List what the training was told."""
    names = (
        *("loss", "alpha", "gamma", "batch_size", "learning_rate", "weight_decay"),
        *("schedule", "dropout", "early_stopping", "seed"),
    )
    stated = {name: _option(view, name) for name in names if _option(view, name) is not None}
    if not stated:
        return None
    parts = [f"{name.replace('_', ' ')} {value}" for name, value in stated.items()]
    return f"AdamW; {', '.join(parts)}; config.json has every option."


def selection(view: RunView) -> str | None:
    """Say how the number of epochs was chosen."""
    epochs = view.config["chosen_epochs"]
    if view.n_folds <= 1 or len(view.search) <= 1:
        return f"{count(epochs, 'epoch')}, as given; nothing was searched."
    return (
        f"{count(epochs, 'epoch')} of {list_names([str(row['epochs']) for row in view.search])} "
        f"were chosen by {view.config.get('search_measure', 'macro AUROC')}, averaged over "
        f"{count(view.n_folds, 'held-out fold')}; test images took no part."
    )


def ensembling(view: RunView) -> str | None:
    """Say whether models are averaged."""
    finals = {
        "ensemble": f"Probabilities are averaged over the models of {count(view.n_folds, 'fold')}.",
        "refit": "No ensemble: one model is trained again on all train images.",
        "best-fold": "No ensemble: the model of the best fold is taken.",
    }
    return finals.get(str(_option(view, "final")))


def class_imbalance(view: RunView) -> str | None:
    """Say what the loss does about rare findings, and how probabilities are mended after it."""
    loss = _option(view, "loss")
    if loss is None:
        return None
    parameters = {name: _option(view, name) for name in ("alpha", "gamma")}
    said = f" ({', '.join(f'{k} {v}' for k, v in parameters.items())})" if "focal" in loss else ""
    return f"Loss: {loss}{said}; nothing was resampled. {operating_point(view)}"


def software(view: RunView) -> str | None:
    """Name software with versions."""
    return f"{', '.join(f'{name} {version}' for name, version in view.config['versions'].items())}."


def model_output(view: RunView) -> str | None:
    """Say what the model gives."""
    n = count(len(view.config["findings"]), "finding")
    if view.probability == "score":
        return f"A score for each of {n}, which was not calibrated and is no probability."
    return f"A probability for each of {n}."


def operating_point(view: RunView) -> str | None:
    """Say how probabilities were calibrated and thresholds chosen."""
    metrics, rule = view.metrics, view.metrics.get("threshold_rule", "f1")
    method = (metrics.get("calibration") or {}).get("method", "none")
    undecided = metrics.get("findings_undecided", [])
    rare = (
        f" {count(len(undecided), 'finding')} with fewer than {metrics['min_positives']} positive "
        f"training {UNITS[metrics['bootstrap']['unit']]} get no threshold."
        if undecided
        else ""
    )
    return (
        f"Calibration ({method}) and thresholds ({rule}) were chosen on out-of-fold predictions of "
        f"train {plural(view.row)}, never on the test.{rare}"
    )


def predictions(view: RunView) -> str | None:
    """Say what computed the predictions."""
    if view.outer_folds:
        return "By the model of each image's outer fold (outer_predictions.csv)."
    return "By the saved model (model.safetensors), as cxr-cache predict does for other images."


def model_file(view: RunView) -> str | None:
    """Say where the model is."""
    return (
        "model.safetensors in the run's folder holds weights, calibration and thresholds; "
        "cxr-cache predict uses it, and cxr-cache export makes other formats of it."
    )


def bad_input(view: RunView) -> str | None:
    """Say what becomes of images that cannot be read."""
    return (
        "cxr-cache predict refuses a file that it cannot decode faithfully, with the reason, and "
        "gives no prediction for it. It does not judge the quality of a picture."
    )


# -- results ---------------------------------------------------------------------------------------


def measures(view: RunView) -> str | None:
    """List the measures and curves that were computed."""
    names = [known.label for name, known in MEASURES.items() if name != "prevalence"]
    curves = ["calibration"] if view.outer_folds else ["ROC", "precision-recall", "calibration"]
    if "decision_curves" in view.tables and not view.tables["decision_curves"].empty:
        curves.append("decision (net benefit)")
    return f"{list_names(names)}; curves: {list_names(curves)}."


def uncertainty(view: RunView) -> str | None:
    """Say how intervals and tests are made."""
    boot = view.metrics["bootstrap"]
    if not boot["n_resamples"]:
        return None
    text = f"{LEVEL:.0%} intervals from {boot['n_resamples']:,} resamples of whole "
    text += f"{UNITS[boot['unit']]}: {boot.get('interval', '')}"
    differences = view.metrics.get("group_differences", {})
    tests = "; differences between groups by the same t statistic, p values after Holm's correction"
    nested = f" {NESTED_INTERVALS}" if view.outer_folds else ""
    return text + (tests if differences.get("macro") else "") + "." + nested


def robustness(view: RunView) -> str | None:
    """Say what stands beside the main figure."""
    parts = [
        f"{value}: macro AUROC {_interval(entry['macro_auroc'])}"
        for value, entry in view.metrics["test_by_projection"].items()
    ]
    recipe = view.metrics.get("recipe")
    if recipe:
        parts.append(
            f"mean of {recipe['n_trainings']} trainings {_interval(recipe['macro_auroc'])}, which "
            f"spread by {recipe['macro_auroc']['std']:.3f}"
        )
    if logistic := view.metrics.get("logistic"):
        parts.append(f"logistic regression {_interval(logistic['macro_auroc'])}")
    return f"{'; '.join(parts)}." if parts else None


def internal_test(view: RunView) -> str | None:
    """Say what the model scores on its own test."""
    if view.outer_folds:
        area = _interval(view.metrics["test"]["macro_auroc"])
        return f"Nested cross-validation, macro AUROC {area}. {NESTED} {NESTED_MODEL}"
    return (
        f"Held-out test of the same data set, {describe_sample(view.metrics, 'test')}: macro AUROC "
        f"{_interval(view.metrics['test']['macro_auroc'])}."
    )


def test_reads(view: RunView) -> str | None:
    """Say how often the test split was read."""
    return None if view.reads is None else view.reads.to_text()


def performance(view: RunView) -> str | None:
    """State the means over findings with their intervals."""
    test = view.metrics["test"]
    parts = [
        f"macro {known.label} {_interval(test[f'macro_{name}'])}"
        for name, known in MEASURES.items()
        if known.is_headline and f"macro_{name}" in test
    ]
    scored = f"{view.metrics['n_findings_scored']} of {view.metrics['n_findings']} findings scored"
    return f"{'; '.join(parts)}; {scored}. per_finding.csv has every finding."


def diagnostic_performance(view: RunView) -> str | None:
    """State rates at the thresholds."""
    test = view.metrics["test"]
    parts = [
        f"macro {MEASURES[name].label} {_interval(test[f'macro_{name}'])}"
        for name in ("sensitivity", "specificity", "ppv", "npv")
    ]
    return f"At the stored thresholds: {'; '.join(parts)}. per_finding.csv has every finding."


def failures(view: RunView) -> str | None:
    """Count what was decided wrongly."""
    rows = [row for row in view.per_finding.values() if row["threshold"] is not None]
    if not rows:
        return None
    n_missed, n_false = (int(sum(row[name] for row in rows)) for name in ("fn", "fp"))
    return (
        f"At the stored thresholds {n_missed:,} positives were missed and {n_false:,} negatives "
        f"called, over {count(len(rows), 'finding')}; the page shows the surest of them."
    )


def groups(view: RunView) -> str | None:
    """Say how groups of people differ."""
    found = view.metrics.get("group_differences", {})
    lines = [
        f"{row['group'].replace('_', ' ')} {row['value']} minus {row['against']}: mean AUROC "
        f"{row['difference']:+.3f}"
        + ("" if row["low"] is None else f" ({row['low']:+.3f} to {row['high']:+.3f})")
        for row in found.get("macro", [])
        if row["measure"] == "auroc"
    ]
    if not lines:
        return None
    n_differing, n_tested = len(found["differing"]), sum(found["n_tested"].values())
    single = f"{n_differing} of {n_tested} comparisons of single findings differ (Holm, 5 %)"
    return f"{'; '.join(lines)}; {single}. group_differences.csv has all."


def limitations(view: RunView) -> str | None:
    """List what the run itself warns of."""
    metrics = view.metrics
    parts = [warning.rstrip(".") for warning in view.config["warnings"]]
    for name, words in (
        ("findings_undefined", "not scored"),
        ("findings_with_few_positives", "hardly measurable, with few positives in test"),
        ("findings_undecided", "ranked only, with few positives in train"),
    ):
        if metrics.get(name):
            parts.append(f"{words}: {list_names(metrics[name])}")
    parts.append("train and test are of one data set")
    return f"{'. '.join(part[:1].upper() + part[1:] for part in parts)}."


def protocol(view: RunView) -> str | None:
    """Say where the method is written down."""
    version = view.config["versions"].get("cxr-cache", "")
    return (
        f"docs/protocol.md of cxr-cache {version} describes the method; config.json of the run "
        "has every option."
    )


def availability(view: RunView) -> str | None:
    """Name the software and the file of the model."""
    return f"Software: {software(view)} The model is the file model.safetensors of the run."


FACTS: Final[dict[str, Fact]] = {
    fact.__name__: fact
    for fact in (
        data_files,
        flow,
        exclusions,
        preprocessing,
        deidentification,
        missing_labels,
        label_source,
        annotators,
        people,
        outcomes,
        prevalences,
        train_size,
        test_size,
        partition,
        disjoint,
        same_source,
        model_kind,
        architecture,
        predictors,
        input_scale,
        initialisation,
        training,
        selection,
        ensembling,
        class_imbalance,
        software,
        model_output,
        operating_point,
        predictions,
        model_file,
        bad_input,
        measures,
        uncertainty,
        robustness,
        internal_test,
        test_reads,
        performance,
        diagnostic_performance,
        failures,
        groups,
        limitations,
        protocol,
        availability,
    )
}
"""By the names that the tables in ``checklists/`` call them."""
