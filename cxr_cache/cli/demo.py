"""The whole job on phantoms, by the commands that do it: minutes, without data or network."""

from __future__ import annotations

import shlex
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

import pandas as pd

from cxr_cache.common.manifest import read_manifest
from cxr_cache.config import DemoConfig
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.phantoms.styles import STANDARD
from cxr_cache.errors import JobStopped, RunError
from cxr_cache.models.run import Run

ENCODING: Final = (
    *("--model", "random:test_vit"),  # timm's smallest ViT: 6 blocks of width 64
    *("--precision", "fp32", "--tokens", "--unfreeze-layers", "4"),
)
# The recipe suits thousands of images and a trained encoder; a few hundred images and
# random weights need larger steps to get anywhere.
FROZEN: Final = ("--epochs", "10,20,40", "--batch-size", "32", "--lr", "1e-3", "--final", "refit")
TUNED: Final = (
    *("--recipe", "reference", "--epochs", "15", "--unfreeze-layers", "4", "--batch-size", "32"),
    *("--lr", "1e-3", "--head-lr", "1e-3", "--loss", "bce", "--dropout", "0.2"),
    *("--precision", "fp32"),
)


def run_demo(
    folder: str | Path,
    run: Callable[[list[str]], object],
    *,
    n_studies: int = DemoConfig.n_studies,
    seed: int = DemoConfig.seed,
    echo: Callable[[str], object] = print,
) -> Path:
    """Draw phantoms, extract, train, fine-tune, test on another hospital's, and compare.

    Every step is a command that is shown, and run as it would be from a shell. A second call keeps
    what the first has finished with the same commands.

    Parameters
    ----------
    folder
        Gets ``phantoms/``, ``other_phantoms/``, a store of each, the runs ``frozen/`` and
        ``finetuned/``, their tests on the others in ``external/``, the page ``comparison.html`` and
        ``log.txt``, which holds the results that the commands printed.
    run
        Runs a command, given its words behind ``cxr-cache``.
    n_studies
        Phantom studies of the first hospital, of about 1.9 images each; the other has half as many.
    seed
        Of the phantoms and the training.
    echo
        Prints a line.

    Returns
    -------
    Path
        The page that shows both runs beside each other.

    Raises
    ------
    JobStopped
        It was interrupted; the message says what is done, and how to go on.
    """
    steps = _Steps(Path(folder), n_studies, seed, run, echo)
    try:
        return steps.take()
    except KeyboardInterrupt as stop:
        words = ["cxr-cache", "demo", str(folder)]
        words += ["--studies", str(n_studies)] if n_studies != DemoConfig.n_studies else []
        words += ["--seed", str(seed)] if seed != DemoConfig.seed else []
        done = ", ".join(steps.done) or "nothing yet"
        message = f"Done: {done}. The same command goes on from there:\n  {shlex.join(words)}"
        raise JobStopped(message) from (stop.__cause__ or stop)


def open_page(page: Path, echo: Callable[[str], object] = print) -> None:
    """Show a page in the browser, or say where it lies if there is no browser to show it."""
    try:
        is_shown = webbrowser.open(page.absolute().as_uri())
    except webbrowser.Error:
        is_shown = False
    if not is_shown:
        echo(f"There is no browser here. Open this file in one: {page.absolute()}")


class _Steps:
    """The steps of a demo in a folder, and which of them are done."""

    def __init__(
        self,
        folder: Path,
        n_studies: int,
        seed: int,
        run: Callable[[list[str]], object],
        echo: Callable[[str], object],
    ) -> None:
        self.folder, self.n_studies, self.seed = folder, n_studies, seed
        self.run, self.echo = run, echo
        self.done: list[str] = []
        self._keeps = True  # until something is made anew, on which later steps rest

    def take(self) -> Path:
        """Take all steps, and return the page."""
        at, external = self.folder, self.folder / "external"
        frozen, tuned = at / "frozen", at / "finetuned"
        store, other = at / "features.h5", at / "other_features.h5"
        self._tell("1. Draw synthetic chest X-rays (your images take their place later)")
        self._draw(at / "phantoms", self.n_studies, self.seed)
        self._tell("2. Extract: run every image through the encoder, once, and keep its features")
        self.echo("   RANDOM WEIGHTS: this encoder has never seen an image. It shows how the tool")
        self.echo("   works, not how well a trained encoder does, and nothing about radiographs.")
        self._extract(at / "phantoms", store)
        self._tell("3. Train a head on the features; the encoder stays frozen")
        self._train(["train", store], frozen, [*FROZEN, "--seed", self.seed], "frozen head")
        self._tell("4. Fine-tune the last 4 blocks of the encoder, from that head")
        options = ["--from-run", frozen, *TUNED]
        self._train(["finetune", store], tuned, options, "fine-tuned blocks")
        self._tell("5. Test both on another hospital: scanned films, darker, grainier and framed")
        n_other = max(1, self.n_studies // 2)
        self._draw(at / "other_phantoms", n_other, self.seed + 1, style="digitised")
        self._extract(at / "other_phantoms", other)
        for run in (frozen, tuned):
            place = external / run.name
            self._run(["evaluate", run, "--store", other], ["--out", place], place)
            self.echo(f"   {_tested(place)} on the other hospital's images")
        self.done.append("test on the other hospital")
        return self._compare(frozen, tuned, external)

    def _compare(self, frozen: Path, tuned: Path, external: Path) -> Path:
        """Write the page of both runs, and say what the figures say."""
        self._tell("6. Compare them, on the same test studies")
        page, compared = self.folder / "comparison.html", self.folder / "compared"
        images = self.folder / "phantoms" / "images"
        self._run(["report", frozen, tuned], ["--out", page, "--image-dir", images])
        self._run(["compare", frozen, tuned], ["--out", compared])
        others = (external / frozen.name, external / tuned.name)
        self._run(["compare", *others], ["--out", external / "compared"])
        self._tell("What the figures say (macro AUROC: 0.5 is guessing, 1 is perfect)")
        for line in describe(_read_macro(compared), _read_macro(external / "compared")):
            self.echo(f"   {line}")
        self._tell(f"The page of both: {page}   (results of all commands: {self._log})")
        self.echo(f"On the other hospital's images: {external / tuned.name / 'report.html'}")
        self.echo("Next: your own data. A table labels.csv with a row for each image in xrays:")
        self.echo("   $ cxr-cache describe --data labels.csv --image-dir xrays")
        self.echo("   $ cxr-cache extract --data labels.csv --image-dir xrays --store mine.h5")
        self.echo("   $ cxr-cache train mine.h5 --run-dir runs/mine")
        return page

    @property
    def _log(self) -> Path:
        return self.folder / "log.txt"

    def _tell(self, title: str) -> None:
        self.echo(f"\n{title}")

    def _draw(self, place: Path, n_studies: int, seed: int, style: str = STANDARD) -> None:
        drawn = write_phantoms(place, n_studies=n_studies, seed=seed, style=style)
        self.echo(f"   {drawn.n_images} images of {n_studies} studies in {place}")
        self.done.append(f"{place.name} drawn")

    def _extract(self, data: Path, store: Path) -> None:
        self._run(["extract", "--data", data], ["--store", store, *ENCODING], store)
        self.done.append(f"{store.name} extracted")

    def _train(
        self, words: Sequence[object], run_dir: Path, options: Sequence[object], what: str
    ) -> None:
        self._run(words, ["--run-dir", run_dir, *options], run_dir)
        self.echo(f"   {_tested(run_dir)} on test images, which it has not seen")
        self.done.append(what)

    def _run(
        self, words: Sequence[object], options: Sequence[object], place: Path | None = None
    ) -> None:
        """Run a command, unless it has been run to its end, and nothing before it was made anew."""
        given = [str(word) for word in (*words, *options)]
        line = shlex.join(["cxr-cache", *given])
        before = _find_last(place, given[0]) if place is not None else {}
        is_same = before.get("command_line") in (line, f"{line} --overwrite")
        if self._keeps and is_same and before["status"] == "finished":
            self.echo(f"   $ {line}\n   finished before, and kept")
            return
        if place is not None:
            continues = self._keeps and is_same and _is_unfinished(place)
            self._keeps = False
            if given[0] in ("train", "finetune") and place.exists() and not continues:
                given += ["--overwrite"]
        line = shlex.join(["cxr-cache", *given])
        self.echo(f"   $ {line}")
        with self._log.open("a", encoding="utf-8") as log, redirect_stdout(log):
            print(f"$ {line}", flush=True)
            self.run(given)


def _find_last(place: Path, verb: str) -> dict[str, Any]:
    """What the manifest says of the last such command that wrote to a place; empty if none did."""
    entries = read_manifest(place) if place.exists() else []
    return next((entry for entry in reversed(entries) if entry.get("command") == verb), {})


def _is_unfinished(run_dir: Path) -> bool:
    try:
        Run.open(run_dir)
    except RunError:
        return True
    return False


def _tested(folder: Path) -> str:
    """The macro AUROC of a run, or of its test elsewhere."""
    test = Run(folder, {}).read_metrics()["test"]
    figure = test["macro_auroc"]
    interval = "" if figure.get("low") is None else f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    return f"macro AUROC {figure['value']:.3f}{interval}"


def _read_macro(folder: Path) -> dict[str, float]:
    """The macro AUROC by image of a comparison of two runs, as comparison.csv has it."""
    table = pd.read_csv(folder / "comparison.csv")
    chosen = (table["measure"] == "auroc") & (table["rows"] == "images") & table["finding"].isna()
    row: dict[str, float] = table[chosen].iloc[0].to_dict()
    return row


def describe(own: dict[str, float], other: dict[str, float]) -> list[str]:
    """Say in words what a difference is, and what is left of it elsewhere.

    Parameters
    ----------
    own, other
        ``first`` (frozen), ``second`` (fine-tuned), ``difference`` and its bounds ``low`` and
        ``high``, on the test images and on those of the other hospital.
    """
    lines = [
        f"On the test images:      {_figures(own)}",
        f"On the other hospital's: {_figures(other)}",
    ]
    lines.append(f"On the test images {_judge(own)}.")
    lines.append(f"On the other hospital's {_judge(other)}.")
    if own["low"] > 0 and other["low"] > 0:
        share = other["difference"] / own["difference"]
        lines.append(
            f"Of the {own['difference']:+.3f}, {other['difference']:+.3f} ({share:.0%}) is left "
            "there, as measured on other patients."
        )
    lines.append("One training of each was compared: another seed gives other figures.")
    return lines


def _figures(of: dict[str, float]) -> str:
    return (
        f"frozen {of['first']:.3f}, fine-tuned {of['second']:.3f}, "
        f"difference {of['difference']:+.3f} [{of['low']:+.3f}, {of['high']:+.3f}]"
    )


def _judge(of: dict[str, float]) -> str:
    """What the interval of a difference says."""
    if of["low"] > 0:
        return "fine-tuning is better: the interval lies above 0"
    if of["high"] < 0:
        return "fine-tuning is worse: the interval lies below 0"
    if of["low"] <= 0 <= of["high"]:
        return "no difference is shown: the interval holds 0"
    return "no difference is shown: so few images give no interval"
