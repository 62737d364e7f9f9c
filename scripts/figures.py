"""Which figures in README and docs are stale: those that are cheap are computed again.

    python scripts/figures.py [--tables indiana_csv] [--images indiana_256 --embeddings m.npz]

A line for each figure says what the document has and what is found now; figures for which nothing
was given are named with what they need. The exit status is 1 where one is stale.

`--tables` is the folder of the Indiana collection's two complete tables, `--images` that of its
6,352 smaller images with their tables, and `--embeddings` the MobileNet features of these, as
`cxr-cache import` takes them. Figures that take longer have their commands beside them.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from benchmarking import format_table

import cxr_cache
from cxr_cache import Cohort
from cxr_cache.config import TrainConfig
from cxr_cache.metrics.scores import auroc, macro_mean
from cxr_cache.models.heads import HeadBank

ROOT: Final = Path(__file__).parent.parent


class Sources:
    """What figures are computed from; each part once, when the first figure asks for it."""

    def __init__(self, tables: Path | None, images: Path | None, embeddings: Path | None) -> None:
        self.paths = {"tables": tables, "images": images, "embeddings": embeddings}

    def has(self, needed: str) -> bool:
        """Whether the paths of these options were given."""
        return all(self.paths[name] is not None for name in needed.split())

    @cached_property
    def collection(self) -> Cohort:
        """The complete collection."""
        assert self.paths["tables"] is not None
        return cxr_cache.load_cohort(self.paths["tables"])

    @cached_property
    def run(self) -> cxr_cache.Run:
        """`cxr-cache train` with its defaults on the MobileNet features."""
        folder = Path(tempfile.mkdtemp())
        assert self.paths["embeddings"] is not None
        assert self.paths["images"] is not None
        cohort = cxr_cache.load_cohort(self.paths["images"])
        cxr_cache.import_embeddings(self.paths["embeddings"], cohort, folder / "m.h5")
        return cxr_cache.train_head(folder / "m.h5", folder / "run", TrainConfig(n_jobs=1)).run


# -- how each is computed -------------------------------------------------------------------------


def count_head(_: Sources) -> list[float]:
    """Trainable numbers of the reference's head."""
    return [HeadBank(1, 512, 35).n_parameters]


def count_collection(sources: Sources) -> list[float]:
    """Images and studies."""
    return [len(sources.collection), len(set(sources.collection.study_uids))]


def score_nothing(sources: Sources) -> list[float]:
    """Label accuracy of calling no finding present, in per cent."""
    return [100 * (1 - sources.collection.targets.mean())]


def count_effusions(sources: Sources) -> list[float]:
    """Studies with the tags of Effusion; those of all, of two tags, and with Pleural Effusion."""
    assert sources.paths["tables"] is not None
    cells = pd.read_csv(sources.paths["tables"] / "indiana_reports.csv")["Problems"].dropna()
    tags = [{" ".join(tag.lower().split()) for tag in cell.split(";")} for cell in cells]
    both = {"hydropneumothorax", "hemopneumothorax"}
    own = [found for found in tags if found & {"pericardial effusion", "hemothorax", *both}]
    counts = [sum(tag in found for found in own) for tag in ("pericardial effusion", *sorted(both))]
    return [counts[0], len(own), counts[2], sum(bool(f & {"pleural effusion", *both}) for f in own)]


def score_folds(sources: Sources) -> list[float]:
    """Macro AUROC of the MobileNet run: mean of its folds, on test, and there by study."""
    run = sources.run
    findings = run.config["findings"]
    held_out = run.out_of_fold.merge(run.read_table("splits")[["image_id", "fold"]], on="image_id")
    targets = run.read_table("targets").set_index("image_id").loc[held_out["image_id"], findings]
    folds = held_out["fold"].to_numpy()
    scores = [
        macro_mean(
            auroc(targets[folds == k].to_numpy(), held_out.loc[folds == k, findings].to_numpy())
        )
        for k in np.unique(folds)
    ]
    metrics = run.read_metrics()
    of_test = [metrics[rows]["macro_auroc"]["value"] for rows in ("test", "test_by_study")]
    return [float(np.mean(scores)), *of_test]


def judge_rare(sources: Sources) -> list[float]:
    """Micro PPV, label accuracy (%), findings with a positive skill by Brier score, by log loss."""
    test, rows = sources.run.read_metrics()["test"], sources.run.read_table("per_finding")
    better = [int((rows[f"{name}_skill"] > 0).sum()) for name in ("brier", "log_loss")]
    return [test["micro_ppv"]["value"], 100 * test["label_accuracy"]["value"], *better]


class Figure(NamedTuple):
    """Numbers in a document: each group of the pattern holds one."""

    document: str
    pattern: str
    compute: Callable[[Sources], list[float]]
    needs: str = ""
    """Options that must be given."""


FIGURES: Final = (
    Figure("docs/design.md", r"([\d,]+) parameters, Xavier-uniform", count_head),
    Figure("docs/design.md", r"\(([\d,]+) images of ([\d,]+) studies", count_collection, "tables"),
    Figure("docs/design.md", r"\(([\d.]+) % on the reference's data", score_nothing, "tables"),
    Figure(
        "docs/labels.md",
        r"pericardial effusion \((\d+) of its (\d+) studies\), hydropneumothorax \((\d+)\)[^*]*"
        r"\*\*Pleural\s+Effusion\*\*, which (\d+) of",
        count_effusions,
        "tables",
    ),
    Figure(
        "docs/measurements.md",
        r"MobileNet has ([\d.]+) out of fold, ([\d.]+) on test and ([\d.]+) by study",
        score_folds,
        "images embeddings",
    ),
    Figure(
        "docs/measurements.md",
        r"the micro PPV is ([\d.]+), the label accuracy ([\d.]+) %, and\s+(\d+) findings have a "
        r"better Brier score and (\d+) a better log loss",
        judge_rare,
        "images embeddings",
    ),
)


def find_written(figure: Figure) -> list[str]:
    """The figure's numbers as its document has them."""
    found = re.findall(figure.pattern, (ROOT / figure.document).read_text())
    if len(found) != 1:
        raise ValueError(f"{figure.document} has {len(found)} places like {figure.pattern!r}.")
    return [found[0]] if isinstance(found[0], str) else list(found[0])


def write_alike(number: float, written: str) -> str:
    """Write a number with the decimals and separators that another was written with."""
    decimals = len(written.partition(".")[2])
    return f"{number:,.{decimals}f}" if "," in written else f"{number:.{decimals}f}"


def main() -> None:
    """Compute what can be computed and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("tables", "images", "embeddings"):
        parser.add_argument(f"--{name}", type=Path)
    sources = Sources(**vars(parser.parse_args()))
    rows = [["document", "written", "now", ""]]
    for figure in FIGURES:
        written = find_written(figure)
        line = [figure.document, " ".join(written)]
        if sources.has(figure.needs):
            pairs = zip(figure.compute(sources), written, strict=True)
            now = [write_alike(*pair) for pair in pairs]
            rows.append([*line, " ".join(now), "" if now == written else "STALE"])
        else:
            options = " ".join(f"--{name}" for name in figure.needs.split())
            rows.append([*line, "", f"needs {options}"])
    print(format_table(rows))
    sys.exit(any(row[-1] == "STALE" for row in rows))


if __name__ == "__main__":
    main()
