"""Store to run folder: the last blocks of the encoder and a head, from cached tokens or images."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxr_cache.common.devices import resolve_device, resolve_precision
from cxr_cache.common.distributed import barrier, is_main, process_group, world_size
from cxr_cache.common.machine import compare_machines, describe_machine
from cxr_cache.common.wording import count, describe_differences
from cxr_cache.config import FinetuneConfig, RepeatConfig, TrainConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.decoding import dead_workers_explained
from cxr_cache.datasets.images import find_missing
from cxr_cache.datasets.splits import Split
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.identity import require_not_imported
from cxr_cache.encoders.loading import reload_encoder
from cxr_cache.encoders.weights import hash_tensors
from cxr_cache.errors import (
    ConfigError,
    RunError,
    StoreIncompleteError,
    StoreMismatchError,
    TrainingError,
)
from cxr_cache.models.run import Run, SavedModel, require_free
from cxr_cache.models.tuned import TailAndHead, copy_tail, name_blocks
from cxr_cache.store.feature_store import DONE, FeatureStore
from cxr_cache.store.resume import require_continuable
from cxr_cache.store.rows import LabelledRows, find_labelled_rows, read_features
from cxr_cache.store.side_by_side import StorePaths, require_one_store
from cxr_cache.store.studies import StudyTokens
from cxr_cache.store.tokens import ImageTokens, TokenSource, open_tokens
from cxr_cache.training.fit import HeadTask, Trajectory
from cxr_cache.training.frozen_start import Start, load_starts
from cxr_cache.training.outcome import (
    TrainResult,
    describe_codes,
    describe_head,
    describe_labels,
    describe_split,
    note_split,
    tabulate_repeats,
    write_outcome,
)
from cxr_cache.training.search import (
    EpochSearch,
    Weighing,
    count_epochs,
    final_members,
    final_task,
    fold_tasks,
    horizons,
    replay_rates,
    require_trainable_folds,
    search_with,
    seed_of_repeat,
    split_rows,
    stack_members,
    weigh_findings,
)
from cxr_cache.training.tuning import Keeper, TuningData, build_model, tune

_FROZEN: Final = TrainConfig(features="projected", input_norm="l2", flip=False)
"""How the frozen encoder's features are read to say how unlike the training images others are."""

logger = logging.getLogger(__name__)

_FREE: Final = ("device", "tokens_in", "num_workers", "grad_checkpointing")
"""Options that a continued run may change: they decide where and how fast, not what."""

# -- what to train from -----------------------------------------------------------------


def choose_source(store: FeatureStore, config: FinetuneConfig, image_dir: Path | None) -> str:
    """``"tokens"`` or ``"images"``; raises where what was asked for is not there.

    Raises
    ------
    StoreMismatchError
        The store's tokens enter another block, or its embeddings were imported.
    ConfigError
        Neither tokens nor a folder of images are there.
    """
    require_not_imported(
        store.header.encoder,
        f"{store.path} holds",
        "there is no encoder whose blocks could be trained. Extract the images, or use `cxr-cache "
        "train`.",
    )
    if config.source == "images" or (config.source == "auto" and "tokens" not in store.features):
        if image_dir is None:
            raise ConfigError(
                f"{store.path} has no tokens to train from. Add them with the `cxr-cache extract` "
                f"command that made it and --tokens --unfreeze-layers {config.unfreeze_layers}, or "
                "give --image-dir to train end to end from the images."
                if config.source == "auto"
                else "--source images needs --image-dir, the folder with the images."
            )
        if not image_dir.is_dir():
            raise ConfigError(f"{image_dir} is not a folder; give the one with the images.")
        return "images"
    if "tokens" not in store.features:
        raise ConfigError(
            f"{store.path} has no tokens. Add them with the `cxr-cache extract` command that made "
            f"it and --tokens --unfreeze-layers {config.unfreeze_layers}."
        )
    cached = store.header.n_unfrozen
    if cached != config.unfreeze_layers:
        raise StoreMismatchError(
            f"{store.path} holds tokens for other blocks than are to be trained:\n"
            + describe_differences(
                {"unfreeze_layers": (cached, config.unfreeze_layers)}, "in the store", "in this run"
            )
            + f"\nUse --unfreeze-layers {cached}, extract to another file with --unfreeze-layers "
            f"{config.unfreeze_layers}, or train from images with --source images."
        )
    return "tokens"


def _find_rows(
    store: FeatureStore, source: str, labels: Path | None, *, allow_pending: bool, level: str
) -> LabelledRows:
    """Labelled rows that have what the source needs."""
    found = find_labelled_rows(store, labels=labels, allow_pending=allow_pending, level=level)
    has_tokens = store.status[found.rows] == DONE
    if source == "images" or has_tokens.all():
        return found.by(level)
    n_without = int((~has_tokens).sum())
    if not allow_pending or not has_tokens.any():
        raise StoreIncompleteError(
            f"{store.path} holds tokens for {int(has_tokens.sum()):,} of {len(found.rows):,} "
            f"images; {n_without:,} are still to come. Run the `cxr-cache extract --tokens` "
            "command again to finish them."
        )
    verbs = "has no tokens yet and is" if n_without == 1 else "have no tokens yet and are"
    note = f"{n_without:,} of {count(len(store), 'image')} {verbs} left out."
    chosen = np.flatnonzero(has_tokens)
    assert found.flow is not None, "find_labelled_rows has followed the images"
    kept = LabelledRows(
        found.rows[chosen],
        found.cohort.take(chosen),
        (*found.notes, note),
        flow=found.flow.lose("tokens still to come", found.rows[~has_tokens]),
        files=None if found.files is None else found.files[chosen],
    )
    return kept.by(level)


def _open_source(
    store: FeatureStore,
    found: LabelledRows,
    encoder: Encoder,
    config: FinetuneConfig,
    image_dir: Path | None,
) -> TokenSource | StudyTokens:
    source = _open_images(store, found.rows, encoder, config, image_dir)
    return source if found.studies is None else StudyTokens(source, found.studies)


def _open_images(
    store: FeatureStore,
    rows: NDArray[np.intp],
    encoder: Encoder,
    config: FinetuneConfig,
    image_dir: Path | None,
) -> TokenSource:
    if config.source == "tokens":
        return open_tokens(store, rows, encoder.device, config.tokens_in)
    assert image_dir is not None
    return ImageTokens(
        encoder,
        config.unfreeze_layers,
        store,
        rows,
        image_dir,
        flip=config.flip,
        augmentation=config.augmentation,
        num_workers=config.num_workers,
    )


# -- the whole --------------------------------------------------------------------------


def tune_run(
    store_path: StorePaths,
    run_dir: str | Path,
    config: FinetuneConfig | None = None,
    *,
    image_dir: str | Path | None = None,
    from_run: str | Path | None = None,
    labels: str | Path | None = None,
    model: str | None = None,
    allow_pending: bool = False,
    overwrite: bool = False,
    n_repeats: int = RepeatConfig.n_repeats,
    echo: Callable[[str], object] = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> TrainResult:
    """Fine-tune the last blocks with a head by the protocol of ``train``, and write the run folder.

    Parameters and errors are those of :func:`cxr_cache.jobs.runs.finetune_tail`, which calls this
    and then evaluates the run. A run that goes on after an interruption ends with the same weights
    as one that was not interrupted, and one of several processes with those of a single one.
    """
    config, n_repeats = config or FinetuneConfig(), RepeatConfig(n_repeats).n_repeats
    run_dir = Path(run_dir)
    store_path = require_one_store(
        store_path, "Fine-tuning trains the last blocks of one encoder, on its tokens in one store"
    )
    image_dir, labels = (None if p is None else Path(p) for p in (image_dir, labels))
    require_free(run_dir, overwrite=overwrite)
    if from_run is not None and run_dir.resolve() == Path(from_run).resolve():
        raise RunError(f"{run_dir} is the run to start from; --run-dir needs another folder.")
    with (
        _memory_explained(),
        FeatureStore.open(store_path) as store,
        process_group(resolve_device(config.device)) as device,
    ):
        _require_whole_parts(config)
        source = choose_source(store, config, image_dir)
        found = _find_rows(store, source, labels, allow_pending=allow_pending, level=config.level)
        if source == "images":
            _require_images(found.images, image_dir)
        starts: list[Start | None] = [None] * n_repeats
        if from_run is not None:
            starts = [*load_starts(Run.open(from_run), found, store, config, n_repeats)]
        start = starts[0]
        split = start.split if start else split_rows(found.cohort, found.studies, config)
        require_trainable_folds(found.cohort.targets, split, config)
        encoder = reload_encoder(store.header.encoder, model=model, device=str(device))
        require_continuable(store, encoder)
        tail = copy_tail(encoder, config.unfreeze_layers)  # refuses before an old run gives way
        settled = replace(
            config,
            precision=resolve_precision(config.precision, device),
            source=source,
            patch_dropout=_settle_patch_dropout(encoder, config.patch_dropout),
        )
        n_rows = count(len(found.cohort), config.level)
        logger.info("%s: %s on %s, with %s", store_path, n_rows, device, settled)
        notes = found.notes + note_split(split, found.cohort, config.level)
        decisive = _decisive(settled, store, found, labels, from_run, start, split)
        incidental = {
            "split": describe_split(split, found.cohort),
            "label_codes": describe_codes(found.cohort),
            "warnings": list(notes),
            "processes": world_size(),
            "machine": describe_machine(device),
        }
        run = _open_run(run_dir, decisive, incidental, settled, overwrite=overwrite)
        tokens = _open_source(store, found, encoder, settled, image_dir)
        data = TuningData(encoder, tokens, found.cohort.targets, tail)
        if is_main():
            echo(_describe(build_model(data, settled), tokens, settled))
        with dead_workers_explained():
            groups = found.cohort.groups
            weighing = weigh_findings(data.targets, groups, split, settled.select_by)
            make_job = partial(_Job, run, data, split, settled, weighing)
            job = make_job(start, partial(count_epochs, on_progress, n_repeats, 1))
            search = job.search()
            members, history = job.train_final(search)
            predictions = job.predict(members, np.arange(len(data.targets)))
            repeats = [
                make_job(of, partial(count_epochs, on_progress, n_repeats, k), repeat=k).test()
                for k, of in enumerate(starts[1:], start=2)
            ]
        if is_main() and repeats:
            run.config["n_repeats"] = n_repeats
            tested = [predictions[split.is_test], *repeats]
            run.write_table("repeats", tabulate_repeats(found.cohort, split, tested))
        if is_main():
            write_outcome(
                run,
                found.cohort,
                split,
                search,
                settled,
                predictions=predictions,
                features=read_features(store, found.rows, _FROZEN, (), found.studies)[0],
                final_history=history,
                studies=found.studies,
                flow=found.flow,
                files=found.files,
                make_model=partial(
                    _to_model,
                    members,
                    found.cohort.findings,
                    encoder,
                    settled,
                    store.header.tokens_dtype if source == "tokens" else "float32",
                ),
            )
        barrier()  # nobody leaves before the run is written
    return TrainResult(run, search, notes)


def _describe(model: TailAndHead, source: TokenSource | StudyTokens, config: FinetuneConfig) -> str:
    """What trains and what does not, by name and number, and what from."""
    n_tail = sum(p.numel() for p in model.tail.values())
    n_encoder = sum(p.numel() for p in model.encoder.parameters())
    lines = [
        f"Training {n_tail:,} parameters of {', '.join(name_blocks(model.tail))} and "
        f"{model.bank.n_parameters:,} of the head; {n_encoder - n_tail:,} of the encoder stay "
        "frozen.",
        f"From {source.description}.",
    ]
    if config.source == "tokens" and (config.flip or config.augmentation.changes_pixels):
        lines.append(
            "--flip and the changes to pixels are for --source images; a store made with `extract "
            "--tokens --flip` shows mirror images by itself."
        )
    return "\n".join(lines)


def _require_images(cohort: Cohort, image_dir: Path | None) -> None:
    """Raise unless every file is there, before an old run gives way."""
    assert image_dir is not None, "choose_source has seen to that"
    if missing := find_missing(image_dir, cohort.image_ids):
        raise TrainingError(
            f"{len(missing):,} of {count(len(cohort), 'image')} "
            f"{'is' if len(missing) == 1 else 'are'} not in {image_dir}; the first is "
            f"{missing[0]!r}. Give the folder that they were extracted from."
        )


@contextmanager
def _memory_explained() -> Iterator[None]:
    """Turn a GPU that is full into a message."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"The GPU has too little memory: {str(error).splitlines()[0]} What was finished is "
            "kept. Continue with --grad-checkpointing or --tokens-in ram; or start again with a "
            "smaller --batch-size and as much more --accumulate."
        ) from error


def _settle_patch_dropout(encoder: Encoder, share: float | None) -> float:
    """Return the share of patches to leave out of training; raises where none can be."""
    if encoder.tokens_hold_positions:
        return 0.5 if share is None else share
    if share:
        raise ConfigError(
            f"--patch-dropout {share} cannot leave patches out of {encoder.identity.name}: its "
            "blocks read a patch's place from its number (rotary positions). Use --patch-dropout 0."
        )
    return 0.0


def _require_whole_parts(config: FinetuneConfig) -> None:
    """Raise unless every process has as many images of a batch, in pairs where they are mixed."""
    n_own = config.batch_size // world_size()
    if config.mixup and n_own % 2:
        raise ConfigError(
            f"--mixup mixes pairs of images, and --batch-size {config.batch_size} gives "
            f"{'each of the processes ' if world_size() > 1 else ''}{n_own}. Use an even number."
        )
    if config.batch_size % world_size():
        raise ConfigError(
            f"--batch-size {config.batch_size} does not divide into {world_size()} processes. "
            f"Use a multiple of {world_size()}."
        )


def _decisive(
    config: FinetuneConfig,
    store: FeatureStore,
    found: LabelledRows,
    labels: Path | None,
    from_run: str | Path | None,
    start: Start | None,
    split: Split,
) -> dict[str, Any]:
    """What the run's results depend on, to record it, and to know it again."""
    free = _free_options(start is not None)
    options = {name: value for name, value in asdict(config).items() if name not in free}
    row_digests = np.ascontiguousarray(store.read_column("row_digest")[found.rows])
    encoder = store.header.encoder
    return {
        "kind": "finetune",
        "finetune": options,
        "seed": config.seed,
        "findings": list(found.cohort.findings),
        "store": {
            "path": str(store.path),
            "encoder": encoder,
            "cohort": store.header.cohort,
            "rows_sha256": hashlib.sha256(row_digests.data).hexdigest(),
        },
        "reading": store.header.reading,
        "labels": describe_labels(labels),
        "from_run": None
        if start is None
        else {"path": str(from_run), "head_sha256": hash_tensors(start.final_head)},
        "random_encoder": bool(encoder.get("is_random")),
        # States of another split's folds have seen what these hold out.
        **(
            {"split_sha256": hashlib.sha256(split.fold.data).hexdigest()[:16]}
            if start is None
            else {}
        ),
    }


def _free_options(has_start: bool) -> tuple[str, ...]:
    """Options that may differ when a run is continued; a run to start from decides the split."""
    return (*_FREE, "split") if has_start else _FREE


def _open_run(
    run_dir: Path,
    decisive: dict[str, Any],
    incidental: dict[str, Any],
    config: FinetuneConfig,
    *,
    overwrite: bool,
) -> Run:
    """Continue what is there, or begin: all processes look, the main one writes."""
    free = _free_options(decisive["from_run"] is not None)
    options = decisive["finetune"] | {name: getattr(config, name) for name in free}
    whole = decisive | incidental | {"finetune": options}
    run = None
    if not overwrite:
        run = Run.resume(
            run_dir,
            decisive,
            free=[f"finetune.{name}" for name in free],
            incidental=("store.path", "labels.path", "from_run.path"),
            writes=is_main(),
        )
    barrier()  # nobody writes while another still looks
    if run is None and is_main():
        run = Run.create(run_dir, whole, overwrite=overwrite)
    barrier()
    if run is not None and is_main():
        _note_machine(run, incidental["machine"])
    return run or Run(run_dir, whole)


def _note_machine(run: Run, machine: dict[str, Any]) -> None:
    """Let a run that goes on elsewhere say so: its numbers are rounded in two ways."""
    if differences := compare_machines(run.config.get("machine", machine), machine):
        note = f"A part of this run was trained on another machine: {differences}."
        warnings = run.config["warnings"]
        run.record({"warnings": [*warnings, *([] if note in warnings else [note])]})


class _Job:
    """The trainings of one repeat of a run, each of which can be interrupted."""

    def __init__(
        self,
        run: Run,
        data: TuningData,
        split: Split,
        config: FinetuneConfig,
        weighing: Weighing,
        start: Start | None,
        on_progress: Callable[[int, int], None],
        *,
        repeat: int = 1,
    ) -> None:
        self._run, self._data, self._split, self._config = run, data, split, config
        self._weighing, self._start, self._on_progress = weighing, start, on_progress
        self._seed, self._name = seed_of_repeat(config.seed, repeat), f"repeat-{repeat}"
        self._prefix = "" if repeat == 1 else f"{self._name}-"
        tasks = fold_tasks(split, self._seed)
        one_will_do = not config.searches and config.final == "refit"  # for the thresholds
        self.tasks = tasks[:1] if one_will_do else tasks
        self._n_epochs_in_all = sum(horizons(config)) * len(self.tasks)
        if config.final == "refit":
            self._n_epochs_in_all += config.epochs[-1]  # at most
        self._n_epochs_done = 0

    def search(self) -> EpochSearch:
        """Train every fold, and choose the number of epochs."""
        config, targets = self._config, self._data.targets
        return search_with(self._fit, self.tasks, config, targets, self._weighing)

    def test(self) -> NDArray[np.float32]:
        """Train all of it for its predictions of the test rows, ``(n, F)``; only these are kept."""
        if (state := self._run.load_state(self._name)) is None:
            members, _ = self.train_final(self.search())
            rows = np.flatnonzero(self._split.is_test)
            state = {"tested": torch.from_numpy(self.predict(members, rows))}
            if is_main():
                self._run.save_state(self._name, state)
                self._run.drop_states(self._prefix)
            barrier()
        else:
            self._on_progress(self._n_epochs_in_all, self._n_epochs_in_all)
        tested: NDArray[np.float32] = state["tested"].numpy()
        return tested

    def _fit(
        self, tasks: Sequence[HeadTask], horizon: int, keep: Collection[int]
    ) -> list[Trajectory]:
        """Train the folds one after the other; see :data:`cxr_cache.training.search.FitTasks`."""
        heads = self._start.fold_heads if self._start else [None] * len(tasks)
        return [
            self._tune(
                f"{self._prefix}fold-{k}-of-{horizon}-epochs",
                task,
                n_epochs=horizon,
                keep=keep,
                keep_weights=self._config.final != "refit",
                head=head,
            )
            for k, (task, head) in enumerate(zip(tasks, heads, strict=False), start=1)
        ]

    def train_final(self, search: EpochSearch) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """The final model's tensors, its members on axis 0, and its history if it was refitted."""
        if self._config.final != "refit":
            return self._rounded(
                stack_members(final_members(search, self._config), search.chosen)
            ), []
        rates = replay_rates(search)
        self._n_epochs_in_all += len(rates) - self._config.epochs[-1]
        trajectory = self._tune(
            f"{self._prefix}final",
            final_task(self._split, self._seed),
            n_epochs=len(rates),
            keep=[len(rates)],
            keep_weights=True,
            head=self._start.final_head if self._start else None,
            learning_rates=rates,
        )
        return self._rounded(trajectory.weights[len(rates)]), trajectory.history

    def _tune(self, name: str, task: HeadTask, **options: Any) -> Trajectory:
        keeper = Keeper(
            load=partial(self._run.load_state, name),
            save=partial(self._run.save_state, name) if is_main() else None,
        )
        config = self._config
        if "learning_rates" in options:  # nothing is held out: the folds decided when to stop
            config = replace(config, early_stopping=None)
        return tune(self._data, task, config, keeper=keeper, on_epoch=self._count_epoch, **options)

    def _count_epoch(self) -> None:
        self._n_epochs_done += 1
        self._on_progress(self._n_epochs_done, self._n_epochs_in_all)

    def _rounded(self, members: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they will be read from the model file."""
        saved = _to_save(members, half=self._config.half)
        return {name: tensor.float() for name, tensor in saved.items()}

    def predict(self, members: dict[str, Tensor], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Probabilities of these rows, averaged over the members, ``(n, F)``."""
        model = build_model(self._data, self._config)
        parts = []
        for member in range(len(members["weight_0"])):
            model.restore({name: tensor[member : member + 1] for name, tensor in members.items()})
            parts.append(model.probabilities(self._data.source, rows))
        mean: NDArray[np.float32] = np.mean(parts, axis=0, dtype=np.float32)
        return mean


def _to_model(
    members: dict[str, Tensor],
    findings: tuple[str, ...],
    encoder: Encoder,
    config: FinetuneConfig,
    tokens_dtype: str,
    thresholds: dict[str, float],
) -> SavedModel:
    tail = {
        "unfreeze_layers": config.unfreeze_layers,
        "boundary_block": int(encoder.identity.n_blocks or 0) - config.unfreeze_layers,
        "precision": config.precision,
        "tokens": tokens_dtype,
    }
    tensors, identity = _to_save(members, half=config.half), encoder.identity.to_dict()
    return SavedModel(tensors, findings, thresholds, identity, describe_head(config), tail)


def _to_save(members: dict[str, Tensor], *, half: bool) -> dict[str, Tensor]:
    """Blocks in float16 if asked for; a head is small, and its variances may be too."""
    dtype = torch.float16 if half else torch.float32
    return {
        name: tensor.to(dtype) if name.startswith("visual.") else tensor
        for name, tensor in members.items()
    }
