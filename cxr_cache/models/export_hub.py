"""A run -> a folder for the Hugging Face Hub: card, trained weights, configuration, preprocessing.

Like an adapter there, it holds what was trained, and names the encoder that goes before it by the
digest of its weights, without a copy: the encoder has a licence and a page of its own.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, Final

from cxr_cache.common.wording import list_names
from cxr_cache.errors import ExportError
from cxr_cache.models.run import Run, SavedModel

PREPROCESSING_FILE: Final = "preprocessing.json"
_CARD: Final = "README.md"
_KEPT: Final = (
    *("format_version", "versions", "kind", "seed", "findings", "random_encoder"),
    *("chosen_epochs", "search_measure", "n_repeats", "findings_unlearnt"),
)
"""What config.json takes over; what else a run records names folders and files of its maker."""
_COPIED: Final = ("training_distribution.safetensors", "metrics.json", "per_finding.csv")
_LEFT_OUT: Final = "A warning that names patients was left out here; the run's own page has it."
_HOW_TO_USE: Final = """
## How to use

```
pip install cxr-cache
hf download ORGANISATION/NAME --local-dir {name}
cxr-cache predict {name} image.png
```

`model.safetensors` holds what was trained, and in its metadata the thresholds and the calibration.
`config.json` says how it was trained and what it computes, and `preprocessing.json` how images are
prepared. {encoder}

In Python:

```
from cxr_cache import Run, load_encoder, predict_images

run = Run.open("{name}")
encoder = load_encoder({encoder_name!r}{precision})
print(predict_images(run, ["image.png"], encoder).to_table())
```
"""


def require_card(run: Run, _model: SavedModel) -> None:
    """Raise ExportError unless the run has a model card."""
    if not run.read_model_card():
        raise ExportError(
            f"{run.path} has no model card, which is the page of a repository on the Hub. Write it "
            f"with `cxr-cache report {run.path}`."
        )


def write_hub(
    run: Run, model: SavedModel, description: Mapping[str, Any], folder: Path
) -> tuple[str, ...]:
    """Write the folder, which :meth:`Run.open` and ``cxr-cache predict`` take as they take a run.

    No path of this machine and no patient is named in it: encoders that lie in local folders keep
    the last part of their names, and warnings that name patients are left out of the card. Gives
    what its user has to know.
    """
    shortened = {str(one["name"]): _shorten(str(one["name"])) for one in model.encoders}
    public = [{**one, "name": shortened[str(one["name"])]} for one in model.encoders]
    folder.mkdir(parents=True)
    written = Run(folder, {})
    written.save_model(replace(model, encoder=public[0], further_encoders=tuple(public[1:])))
    stores = [
        {"encoder": encoder, "cohort": store.get("cohort")}
        for encoder, store in zip(public, run.stores, strict=True)
    ]
    kind = run.config["kind"]
    config = {
        **{name: run.config[name] for name in _KEPT if name in run.config},
        **({kind: run.config[kind]} if kind in run.config else {}),
        "store": stores[0],
        **({"further_stores": stores[1:]} if stores[1:] else {}),
        "model": {k: v for k, v in description.items() if k != "run"} | {"encoder": public[0]},
        "status": "finished",
    }
    _write_json(folder / "config.json", config)
    prepared = [one["preprocessing"] for one in public]
    _write_json(folder / PREPROCESSING_FILE, prepared[0] if len(prepared) == 1 else prepared)
    for name in _COPIED:
        if (run.path / name).is_file():
            shutil.copyfile(run.path / name, folder / name)
    name = run.path.resolve().name
    card = _clean_card(run, shortened) + _say_how(name, public)
    (folder / _CARD).write_text(card, encoding="utf-8")
    return _notes(run, shortened, card)


def _shorten(encoder: str) -> str:
    """``local-dir:/home/me/encoders/mine`` -> ``local-dir:mine``; other names are public."""
    scheme, separator, path = encoder.partition(":")
    if not scheme.startswith("local-"):
        return encoder
    path, mark, options = path.partition("?")
    return f"{scheme}{separator}{PurePath(path).name}{mark}{options}"


def _clean_card(run: Run, shortened: Mapping[str, str]) -> str:
    """The run's card without local folders and without lines that name patients."""
    card = run.read_model_card()
    for long, short in shortened.items():
        card = card.replace(long, short)
    patients = _list_patients(run)
    named = [line for line in run.config.get("warnings", ()) if _names_any(line, patients)]
    lines = []
    for line in card.splitlines():
        is_of_patients = line.startswith("* ") and any(_is_cell(line, one) for one in named)
        lines.append(f"* {_LEFT_OUT}" if is_of_patients else line)
    return "\n".join(lines) + "\n"


def _list_patients(run: Run) -> set[str]:
    if not run.has_table("predictions"):
        return set()
    table = run.predictions
    columns = [name for name in ("patient_id", "study_uid") if name in table]
    return {str(name) for column in columns for name in table[column]} - {""}


def _names_any(warning: str, patients: set[str]) -> bool:
    """Whether a warning lists a patient or a study, which it does behind a colon."""
    listed = re.split(r", |; | and |\. |\.$", warning.partition(": ")[2])
    return any(one in patients for one in listed)


def _is_cell(line: str, warning: str) -> bool:
    """Whether a line of the card is this warning, but for its markup and white space."""
    plain = [re.sub(r"[\\\s]", "", text) for text in (line.removeprefix("* "), warning)]
    return plain[0] == plain[1]


def _say_how(name: str, encoders: list[dict[str, Any]]) -> str:
    names = [str(one["name"]) for one in encoders]
    digests = [str(one.get("weights_sha256", "unknown")) for one in encoders]
    is_local = any(one.startswith("local-") for one in names)
    where = (
        "It lies in no repository: give its folder with `--model`."
        if is_local
        else "It is loaded from where its name says; another one is refused."
    )
    encoder = (
        f"The encoder is not in this repository: {list_names(names)}, vision weights SHA-256 "
        f"{list_names([f'`{digest}`' for digest in digests])}. {where}"
    )
    precision = f", precision={encoders[0]['precision']!r}" if "precision" in encoders[0] else ""
    return _HOW_TO_USE.format(
        name=name, encoder=encoder, encoder_name=names[0], precision=precision
    )


def _notes(run: Run, shortened: Mapping[str, str], card: str) -> tuple[str, ...]:
    notes = ["Nothing was uploaded. To do so: hf upload ORGANISATION/NAME FOLDER"]
    if local := [long for long, short in shortened.items() if long != short]:
        notes.append(
            f"The encoder lies in a local folder ({list_names(local)}) and is not in the export: "
            "whoever predicts with it needs a copy, given with --model."
        )
    if re.search(r"^license: unknown$", card, re.MULTILINE):
        notes.append(
            f"The card names no licence; `cxr-cache report {run.path} --license ID` writes one."
        )
    if _LEFT_OUT in card:
        notes.append("Warnings that name patients were left out of the card.")
    return tuple(notes)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
