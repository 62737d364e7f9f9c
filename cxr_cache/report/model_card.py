"""An evaluated run -> its model card, in the form of the Hugging Face Hub."""

from __future__ import annotations

import re
from typing import Any, Final

from cxr_cache.config import CardConfig
from cxr_cache.datasets.labels import FINDINGS
from cxr_cache.evaluation.evaluate import (
    FEW_POSITIVES,
    LEVEL,
    NESTED,
    NESTED_INTERVALS,
    NESTED_MODEL,
    describe_sample,
)
from cxr_cache.evaluation.figures import MEASURES
from cxr_cache.models.run import Run
from cxr_cache.report.page import make_environment
from cxr_cache.report.views import RunView

UNKNOWN: Final = CardConfig.license_id

_TAGS: Final = ("chest-x-ray", "radiology", "medical", "multi-label-classification", "cxr-cache")
_DIGITS: Final = 4
_HUB_PREFIX: Final = "hf-hub:"
_STATED: Final = {
    "license_id": r"^license: *(\S+)$",
    "dataset_id": r"^datasets:\n *- *(\S+)$",
}
"""Where the header has what a run does not know of itself."""

# Figure in metrics.json, metric of the Hub, name.
_METRICS: Final = (
    *(
        (f"macro_{name}", measure.hub_metric, f"macro {measure.label}")
        for name, measure in MEASURES.items()
        if measure.hub_metric
    ),
    ("label_accuracy", "accuracy", "label accuracy"),
    ("label_accuracy_all_negative", "accuracy", "label accuracy of predicting nothing"),
)


def render_card(view: RunView, *, license_id: str = UNKNOWN, dataset_id: str = UNKNOWN) -> str:
    """The card as Markdown with a YAML header.

    Parameters
    ----------
    view
        An evaluated run.
    license_id, dataset_id
        Identifiers of the Hub; what a run does not know of itself.

    Returns
    -------
    str
        Text of ``README.md`` of a model repository.
    """
    environment = make_environment()
    environment.filters["cell"] = to_cell
    body = environment.get_template("model_card.md.j2").render(
        view=view,
        config=view.config,
        metrics=view.metrics,
        test=view.metrics["test"],
        license_id=license_id,
        dataset_id=dataset_id,
        unknown=UNKNOWN,
        is_indiana=tuple(view.config["findings"]) == FINDINGS,
        few_positives=FEW_POSITIVES,
        level=LEVEL,
        nested=NESTED,
        nested_model=NESTED_MODEL,
        nested_intervals=NESTED_INTERVALS,
    )
    return f"---\n{_header(view, license_id, dataset_id)}\n---\n\n{body.strip()}\n"


def read_card(run: Run) -> dict[str, Any]:
    """What a run's card states of licence and data set, to write it again; empty without a card."""
    header = run.read_model_card().partition("\n---\n")[0]
    found = {name: re.search(line, header, re.MULTILINE) for name, line in _STATED.items()}
    return {name: match[1] for name, match in found.items() if match}


def _header(view: RunView, license_id: str, dataset_id: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # takes half a second

    metrics = view.metrics
    encoders = [str(store["encoder"]["name"]) for store in view.stores]
    on_hub = [
        name.removeprefix(_HUB_PREFIX).partition("@")[0]
        for name in encoders
        if name.startswith(_HUB_PREFIX)
    ]
    kind_of_test = "nested test " if view.outer_folds else "test "
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="multi-label findings on chest X-rays",
            dataset_type=dataset_id,
            dataset_name=f"{dataset_id} ({describe_sample(metrics, 'test', kind_of_test)})",
            dataset_split="nested cross-validation" if view.outer_folds else "test",
            metric_type=kind,
            metric_name=name,
            metric_value=round(metrics["test"][key]["value"], _DIGITS),
            metric_args=_interval(metrics["test"][key]),
        )
        for key, kind, name in _METRICS
        if metrics["test"][key]["value"] is not None
    ]
    card = ModelCardData(
        license=license_id,
        library_name="cxr-cache",
        pipeline_tag="image-classification",
        tags=list(_TAGS),
        datasets=None if dataset_id == UNKNOWN else [dataset_id],
        metrics=sorted({kind for _, kind, _ in _METRICS}),
        base_model=(on_hub if len(on_hub) > 1 else on_hub[0]) if on_hub else None,
        model_name=view.name,
        eval_results=results,
    )
    return str(card.to_yaml()).strip()


def _interval(entry: dict[str, Any]) -> dict[str, float] | None:
    if entry.get("low") is None:
        return None
    low, high = (round(entry[bound], _DIGITS) for bound in ("low", "high"))
    return {"interval_level": LEVEL, "interval_low": low, "interval_high": high}


def to_cell(text: object) -> str:
    """Make text fit one cell of a Markdown table: no markup, no second line."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", one_line)
