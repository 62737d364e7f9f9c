"""An evaluated run -> its plots, page and model card; several runs -> one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cxr_cache.common.files import write_whole
from cxr_cache.config import CardConfig, CompareConfig
from cxr_cache.errors import ConfigError, RunError
from cxr_cache.evaluation.compare import compare_runs, require_one_protocol
from cxr_cache.evaluation.scored import read_scored
from cxr_cache.models.run import Run
from cxr_cache.report.cases import PER_KIND, find_cases
from cxr_cache.report.model_card import render_card
from cxr_cache.report.page import MAX_RUNS, render_curve_page, render_page
from cxr_cache.report.pictures import draw_maps, draw_thumbnails
from cxr_cache.report.plots import draw_plots, draw_test_plots
from cxr_cache.report.views import collect_differences, read_external_view, read_view
from cxr_cache.store.feature_store import FeatureStore

if TYPE_CHECKING:
    from cxr_cache.encoders.encoder import Encoder
    from cxr_cache.training.ablate import Ablation

_MARK: Final = b'<meta name="generator" content="cxr-cache">'


def write_report(
    run: Run,
    *,
    image_dir: str | Path | None = None,
    encoder: Encoder | None = None,
    license_id: str = CardConfig.license_id,
    dataset_id: str = CardConfig.dataset_id,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draw the plots of an evaluated run, and write its page and model card into its folder.

    Parameters
    ----------
    run
        A run with ``metrics.json`` and ``per_finding.csv``.
    image_dir
        Folder of its images: small pictures of the surest hits, misses and false alarms go into
        the page, which may then not be shared if the images may not. None leaves them out.
    encoder
        The run's: the page then also shows where in these pictures the run looked. Goes with
        `image_dir`.
    license_id, dataset_id
        What the model card states, as identifiers of the Hugging Face Hub.
    on_progress
        Called with the numbers of pictures looked into and in all, where there is an encoder.

    Returns
    -------
    Path
        ``report.html`` in the run folder, one file that needs no other.

    Raises
    ------
    RunError
        The run has not been evaluated, or a table is missing; or `encoder` is another one.
    ConfigError
        `image_dir` is not the folder of the run's images.
    EncoderError
        `encoder` is of a kind that cannot show where it looked.

    Examples
    --------
    >>> write_report(Run.open("runs/first"), image_dir="DATA/images")  # doctest: +SKIP
    PosixPath('runs/first/report.html')
    """
    view = read_view(run)  # fails before anything is drawn
    shown = {} if image_dir is None else _show_cases([run], image_dir)
    if image_dir is not None and encoder is not None:
        cases = shown["cases"][0]
        shown["maps"] = draw_maps(run, cases, image_dir, encoder, on_progress=on_progress)
    draw_plots(run)
    run.write_model_card(render_card(view, license_id=license_id, dataset_id=dataset_id))
    return run.write_report(render_page([view], **shown))


def write_external_report(test: Run) -> Path:
    """Draw the plots of a test on another data set, and write its page into its folder.

    Parameters
    ----------
    test
        The folder with the tables and the metrics of the test, as a run.

    Returns
    -------
    Path
        ``report.html`` there.
    """
    view = read_external_view(test)
    draw_test_plots(test)
    return test.write_report(render_page([view]))


def write_joint_report(
    runs: Sequence[Run],
    path: str | Path,
    *,
    image_dir: str | Path | None = None,
    n_resamples: int = CompareConfig.n_resamples,
) -> Path:
    """Write one page for several evaluated runs, with paired differences to the first of them.

    Parameters
    ----------
    runs
        Two or more, with the same findings, test images and targets.
    path
        HTML file to write; it may exist if it is such a page.
    image_dir
        As in :func:`write_report`.
    n_resamples
        Of the paired bootstrap; see :func:`cxr_cache.evaluation.compare.compare_runs`.

    Raises
    ------
    RunError
        The runs cannot be compared, one was not evaluated, or there are too many of them.
    ConfigError
        `path` holds something else, or `image_dir` is not the folder of the runs' images.
    """
    path = Path(path)
    if len(runs) > MAX_RUNS:
        raise RunError(f"{len(runs)} runs do not fit on one page; give at most {MAX_RUNS}.")
    require_page_path(path)
    for run in runs:
        run.read_metrics()  # what can fail at once fails before the long part
    require_one_protocol(runs)
    for run in runs:
        if run.level != runs[0].level:
            raise RunError(
                f"{runs[0].path} predicts by {runs[0].level} and {run.path} by {run.level}, which "
                "does not go on one page. `cxr-cache compare` compares them by study."
            )
    comparison = compare_runs(*runs, n_resamples=n_resamples)
    views = [read_view(run, name) for run, name in zip(runs, comparison.runs, strict=True)]
    shown = {} if image_dir is None else _show_cases(runs, image_dir)
    page = render_page(
        views,
        differences=collect_differences(comparison),
        by_study=collect_differences(comparison, "studies") if len(comparison.rows) > 1 else None,
        unit=comparison.unit,
        notes=comparison.notes,
        **shown,
    )
    write_whole(path, page.encode())
    return path


def write_curve_page(ablation: Ablation, store: str | Path, path: str | Path) -> Path:
    """Write the page of a learning curve.

    Parameters
    ----------
    ablation
        One that has a curve.
    store
        The feature store that it trained on, or the first of several.
    path
        HTML file to write.
    """
    with FeatureStore.open(store) as features:
        page = render_curve_page(ablation, features.header, str(store))
    write_whole(Path(path), page.encode())
    return Path(path)


def require_page_path(path: Path) -> None:
    """Raise ConfigError unless a page can be written there without replacing anything else."""
    if path.exists() and _MARK not in path.read_bytes()[:4000]:
        raise ConfigError(f"{path} is not a page of cxr-cache; choose another name with --out.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it, or give another.")


def _show_cases(runs: Sequence[Run], image_dir: str | Path) -> dict[str, Any]:
    """Cases of every run, fewer where there are several, and the pictures that they need."""
    cases = []
    for run in runs:
        run.require_images("the pictures on a page are of single images")
        run.require_holdout("the pictures on a page are of these")
        images = read_scored(run)
        cuts = run.operating_point.thresholds
        cases.append(find_cases(images, cuts, max(1, PER_KIND // len(runs))))
    image_ids = [
        case["image_id"]
        for of_run in cases
        for of_finding in of_run.values()
        for of_kind in of_finding.values()
        for case in of_kind
    ]
    preprocessing = runs[0].config["store"]["encoder"].get("preprocessing")
    pictures, problems = draw_thumbnails(image_dir, image_ids, preprocessing)
    return {"cases": cases, "pictures": pictures, "problems": problems}
