"""How the labels of published data sets were made, for whoever reads figures of a model."""

from __future__ import annotations

from typing import Final

_BY_PROGRAM: Final = "were taken from the reports by a program, not from the images"
_BY_INDEXERS: Final = (
    "are groups of terms by which people indexed the reports; nobody labelled the images"
)
_BY_EYE: Final = "are those of radiologists who looked at the images"

_LABELS: Final = {
    "indiana": _BY_INDEXERS,
    "openi": _BY_INDEXERS,
    "phantoms": "are what the synthetic images were drawn with",
    "nih": _BY_PROGRAM,
    "chexpert": f"{_BY_PROGRAM}; those for validation and test are radiologists'",
    "chexpert-plus": _BY_PROGRAM,
    "mimic-cxr-jpg": (
        f"{_BY_PROGRAM}; where the table of the labelled test studies is there, a radiologist read "
        "the reports of these"
    ),
    "padchest": "were taken from the reports, 27 % of them by physicians and the rest by a program",
    "vindr": _BY_EYE,
    "brax": _BY_PROGRAM,
    "rsna": _BY_EYE,
    "siim": _BY_EYE,
    "taix-ray": "were entered by radiologists in a form for each image, as they reported on it",
}
"""By the name of the reader."""


def say_whose_labels(data_set: str) -> str:
    """Say in a sentence how the labels of a data set were made; its format, or ``""``, is given."""
    if data_set in _LABELS:
        said = f"Labels {_LABELS[data_set]}."
        if "report" in _LABELS[data_set].split(",")[0]:
            said += " A model is scored on agreeing with reports."
        return said
    return (
        "Labels are those of your own table, and nothing is known here of how they were made. If "
        "they come from reports, a model is scored on agreeing with reports."
    )
