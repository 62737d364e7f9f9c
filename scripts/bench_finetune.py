"""What cached tokens save: images/s of one training step, from the reference's way to ours.

    python scripts/bench_finetune.py [--model NAME] [--precision bf16] [--rounds 5] [--quick]

Everybody trains the last two blocks of the same encoder (ViT-B/16 at full size in BiomedCLIP's
layout, random weights) and the same head with focal loss and AdamW, 16 images a step:

1. the reference's way: 2,048-pixel PNG files through open_clip's transform and whole image tower,
   with gradients in the last two blocks;
2. the same from decoded pixels (uint8, in memory);
3. from tokens in memory, with the plain last block;
4. from tokens in memory, with the last block for the class token only;
5. the product: `cxr_cache.training.tuning.tune` on a store with tokens, read from memory and
   from the file.

1 to 4 are bare loops of plain PyTorch. The floor is forward and backward of 4 alone. Each works in
a process of its own, whose peak memory is its own; they take turns, so that a busy machine slows
all alike; medians over the turns. The losses of 2, 3 and 4 must agree, or the status is 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarking import (
    commit_tokens,
    describe_machine,
    format_table,
    make_cohort,
    results_path,
    write_json,
)
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from cxr_cache.config import FinetuneConfig
from cxr_cache.datasets.images import read_image
from cxr_cache.datasets.phantoms.dataset import draw_phantom
from cxr_cache.encoders.encoder import Encoder, trainable_parameter_names
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.models.heads import HeadBank
from cxr_cache.models.tuned import copy_tail
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.tokens import open_tokens
from cxr_cache.training.fit import HeadTask
from cxr_cache.training.tuning import TuningData, tune

N_UNFROZEN, BATCH_SIZE = 2, 16
N_IMAGES = BATCH_SIZE
LARGEST_DISAGREEMENT = {"fp32": 1e-4, "bf16": 1e-2}
"""Of losses, relative."""


@dataclass(frozen=True)
class Bench:
    """What every contestant is given."""

    folder: Path
    encoder: str
    precision: Any
    n_rounds: int

    def load_encoder(self) -> Encoder:
        """The encoder, frozen, on the processor."""
        return load_encoder(self.encoder, device="cpu", precision=self.precision)

    def image_path(self, row: int) -> Path:
        """Where the PNG file lies."""
        return self.folder / f"{row:02d}.png"

    def load(self, name: str) -> NDArray[Any]:
        """What :func:`prepare` has left: pixels, tokens, or targets."""
        values: NDArray[Any] = np.load(self.folder / f"{name}.npy")
        return values


def prepare(bench: Bench, image_size_px: int) -> float:
    """Draw the images and write pixels, float32 tokens and a store; mean bytes of a PNG file."""
    encoder, cohort = bench.load_encoder(), make_cohort(N_IMAGES)
    for row in range(N_IMAGES):
        rng = np.random.default_rng(row)
        picture, _ = draw_phantom([], "Frontal", rng, image_size_px)
        Image.fromarray(picture).save(bench.image_path(row))
    names = [bench.image_path(row).name for row in range(N_IMAGES)]
    decoded = [read_image(bench.folder, name, encoder.preprocessing) for name in names]
    pixels = np.stack([image.pixels for image in decoded])
    with torch.no_grad():
        tokens = encoder.stem(encoder.prepare(torch.from_numpy(pixels)), N_UNFROZEN).numpy()
    for name, values in {"pixels": pixels, "tokens": tokens, "targets": cohort.targets}.items():
        np.save(bench.folder / f"{name}.npy", values)
    identity = encoder.identity
    shapes = {"embeddings": (1, identity.embedding_width), "tokens": (1, *tokens.shape[1:])}
    with FeatureStore.create(
        bench.folder / "store.h5",
        cohort,
        encoder=identity.to_dict(),
        features=shapes,
        boundary_block=int(identity.n_blocks or 0) - N_UNFROZEN,
    ) as store:
        commit_tokens(store, np.arange(N_IMAGES), tokens[:, None].astype(np.float16))
    return mean(bench.image_path(row).stat().st_size for row in range(N_IMAGES))


# -- turns ------------------------------------------------------------------------------


class Turns:
    """A contestant's side of the pipe: wait for the turn, do it, report."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._started = pipe, 0.0

    def wait(self) -> None:
        """Return when it is this contestant's turn; end the process when there is none left."""
        try:
            self._pipe.recv()
        except EOFError:
            raise SystemExit from None
        self._started = time.perf_counter()

    def report(self, n_images: int, **more: Any) -> None:
        """Say how much was done since :meth:`wait` returned."""
        seconds = time.perf_counter() - self._started
        peak_mb = _peak_bytes() / 1e6
        self._pipe.send({"images_per_s": n_images / seconds, "peak_mb": peak_mb, **more})


def _peak_bytes() -> int:
    """Of this process since it began; getrusage would count its parent's memory, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


# -- plain PyTorch ----------------------------------------------------------------------


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The reference's: alpha on every term."""
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (0.25 * (1 - torch.exp(-bce)) ** 2 * bce).mean()


def train_plainly(
    bench: Bench,
    turns: Turns,
    n_steps: int,
    load: Callable[[Bench, Encoder], Callable[[Sequence[int]], Tensor]],
    embed: Callable[[Encoder, Tensor], Tensor],
) -> None:
    """A bare loop: `load` gives what reads a batch, `embed` turns the batch into embeddings."""
    encoder, recipe = bench.load_encoder(), FinetuneConfig.of_recipe("reference")
    load_batch, targets = load(bench, encoder), torch.from_numpy(bench.load("targets"))
    tail = [encoder.get_parameter(n) for n in trainable_parameter_names(encoder, N_UNFROZEN)]
    for parameter in tail:
        parameter.requires_grad_()
    head = HeadBank(1, encoder.identity.embedding_width, targets.shape[1]).as_sequential(0)
    groups = [
        {"params": tail, "lr": recipe.learning_rate},
        {"params": head.parameters(), "lr": recipe.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    in_bf16 = torch.autocast("cpu", torch.bfloat16, enabled=bench.precision == "bf16")
    step = 0
    while True:
        turns.wait()
        losses, loading_s, floor_s = [], 0.0, 0.0
        for _ in range(n_steps):
            rows = np.random.default_rng(step).permutation(N_IMAGES)[:BATCH_SIZE]
            torch.manual_seed(step)  # everybody drops out the same units
            mark = time.perf_counter()
            batch, wanted = load_batch(rows.tolist()), targets[rows]
            loading_s += time.perf_counter() - mark
            mark = time.perf_counter()
            with in_bf16:
                embeddings = embed(encoder, batch)
            loss = focal_loss(head(F.normalize(embeddings.float())), wanted)
            loss.backward()  # type: ignore[no-untyped-call]
            floor_s += time.perf_counter() - mark
            nn.utils.clip_grad_norm_([*tail, *head.parameters()], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
        n_images = n_steps * BATCH_SIZE
        turns.report(
            n_images, losses=losses, loading_s=loading_s, floor_images_per_s=n_images / floor_s
        )


def load_files(bench: Bench, encoder: Encoder) -> Callable[[Sequence[int]], Tensor]:
    """Decode the files anew with open_clip's own transform."""
    from open_clip.transform import image_transform

    given = encoder.preprocessing
    transform = image_transform(
        given.image_size_px, is_train=False, mean=given.mean, std=given.std, resize_mode="shortest"
    )
    return lambda rows: torch.stack([transform(Image.open(bench.image_path(r))) for r in rows])


def load_pixels(bench: Bench, encoder: Encoder) -> Callable[[Sequence[int]], Tensor]:
    """Take decoded pixels from memory, and normalise."""
    pixels = torch.from_numpy(bench.load("pixels"))
    return lambda rows: encoder.prepare(pixels[rows])


def load_tokens(bench: Bench, _: Encoder) -> Callable[[Sequence[int]], Tensor]:
    """Take float32 tokens from memory."""
    tokens = torch.from_numpy(bench.load("tokens"))
    return lambda rows: tokens[rows]


def embed_whole(encoder: Encoder, pixels: Tensor) -> Tensor:
    """open_clip's image tower."""
    embeddings: Tensor = encoder.visual(pixels)
    return embeddings


def embed_plain_tail(encoder: Encoder, tokens: Tensor) -> Tensor:
    """The last blocks as timm has them, for all tokens."""
    visual: Any = encoder.visual
    for block in visual.trunk.blocks[-N_UNFROZEN:]:
        tokens = block(tokens)
    embeddings: Tensor = visual.head(visual.trunk.forward_head(visual.trunk.norm(tokens)))
    return embeddings


def embed_class_token(encoder: Encoder, tokens: Tensor) -> Tensor:
    """The last block for the class token only."""
    return encoder.tail(tokens, N_UNFROZEN)[1]


# -- the product ------------------------------------------------------------------------


def train_with_product(bench: Bench, turns: Turns, n_steps: int, place: Any) -> None:
    """Epochs of `n_steps` batches; all that ``tune`` does in an epoch counts."""
    config = FinetuneConfig.of_recipe(
        "reference", device="cpu", precision=bench.precision, tokens_in=place
    )
    encoder = bench.load_encoder()

    def end_turn() -> None:
        turns.report(n_steps * BATCH_SIZE)
        turns.wait()

    with FeatureStore.open(bench.folder / "store.h5") as store:
        source = open_tokens(store, np.arange(N_IMAGES), encoder.device, place)
        data = TuningData(encoder, source, store.cohort.targets, copy_tail(encoder, N_UNFROZEN))
        rows = np.resize(np.arange(N_IMAGES), n_steps * BATCH_SIZE)
        task = HeadTask(rows, np.empty(0, np.int64), seed=0)
        n_epochs = bench.n_rounds + 1
        turns.wait()
        tune(data, task, config, n_epochs=n_epochs, keep=[], keep_weights=False, on_epoch=end_turn)


# -- together ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """A way to train, and how many steps it does in a turn."""

    title: str
    train: Callable[[Bench, Turns, int], None]
    n_steps: int


CONTESTANTS = {
    "files": Contestant(
        "(1) PNG files, whole tower",
        partial(train_plainly, load=load_files, embed=embed_whole),
        1,
    ),
    "pixels": Contestant(
        "(2) pixels in memory, whole tower",
        partial(train_plainly, load=load_pixels, embed=embed_whole),
        1,
    ),
    "plain_tail": Contestant(
        "(3) tokens in memory, plain last block",
        partial(train_plainly, load=load_tokens, embed=embed_plain_tail),
        2,
    ),
    "tail": Contestant(
        "(4) tokens in memory, class-token block",
        partial(train_plainly, load=load_tokens, embed=embed_class_token),
        4,
    ),
    "product_ram": Contestant(
        "(5) tune, tokens in memory", partial(train_with_product, place="ram"), 4
    ),
    "product_disk": Contestant(
        "(5) tune, tokens in the file", partial(train_with_product, place="disk"), 4
    ),
}
GOALS = {"files": 7.0, "pixels": 5.5, "floor": 0.85}
"""How many times the speed of these the product should have."""


def _compete(contestant: Contestant, bench: Bench, pipe: Connection) -> None:
    contestant.train(bench, Turns(pipe), contestant.n_steps)


def run_rounds(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Reports of every contestant; the first, of the warm-up, included."""
    context = multiprocessing.get_context("forkserver")  # imports once, before anything computes
    context.set_forkserver_preload(["__main__", "open_clip"])
    pipes = {}
    for name, contestant in CONTESTANTS.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=_compete, args=(contestant, bench, theirs), daemon=True).start()
        theirs.close()
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for _ in range(bench.n_rounds + 1):
        for name, pipe in pipes.items():
            pipe.send("go")
            reports[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.close()
    return reports


def summarise(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all turns but the first."""
    speeds = [report["images_per_s"] for report in reports[1:]]
    summary = {
        "images_per_s": median(speeds),
        "slowest_turn": min(speeds),
        "fastest_turn": max(speeds),
        "peak_mb": reports[-1]["peak_mb"],
    }
    if "losses" in reports[0]:
        summary["losses"] = [loss for report in reports for loss in report["losses"]]
        for name in ("loading_s", "floor_images_per_s"):
            summary[name] = median(report[name] for report in reports[1:])
    return summary


def disagreement(results: dict[str, dict[str, Any]]) -> float:
    """Largest relative difference between the losses of the first steps of (2), (3) and (4)."""
    losses = [results[name]["losses"] for name in ("pixels", "plain_tail", "tail")]
    steps = np.array([values[: min(map(len, losses))] for values in losses])
    return float((np.abs(steps - steps[0]) / steps[0]).max())


def judge(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The product against the plain ways and the floor."""
    baselines = {name: results[name]["images_per_s"] for name in ("files", "pixels")}
    baselines["floor"] = results["tail"]["floor_images_per_s"]
    judged = []
    for name in ("product_ram", "product_disk"):
        for against, goal in GOALS.items():
            ratio = results[name]["images_per_s"] / baselines[against]
            judged.append(
                {"figure": name, "against": against, "ratio": ratio, "goal": goal}
                | {"met": ratio >= goal}
            )
    return judged


def tabulate(results: dict[str, dict[str, Any]], judged: list[dict[str, Any]]) -> str:
    """One line per contestant, with what it is a multiple of."""
    speeds = {name: result["images_per_s"] for name, result in results.items()}
    floor = results["tail"]["floor_images_per_s"]
    rows = [["", "images/s", "slowest", "fastest", "peak MB", "÷ (1)", "÷ (2)", "÷ floor", "met"]]
    for name, result in results.items():
        ratios = [speeds[name] / base for base in (speeds["files"], speeds["pixels"], floor)]
        met = [goal["met"] for goal in judged if goal["figure"] == name]
        rows.append(
            [
                CONTESTANTS[name].title,
                *(f"{result[k]:.2f}" for k in ("images_per_s", "slowest_turn", "fastest_turn")),
                f"{result['peak_mb']:,.0f}",
                *(f"{ratio:.2f}" for ratio in ratios),
                ("yes" if all(met) else "no") if met else "",
            ]
        )
    rows.append(["floor: forward and backward of (4)", f"{floor:.2f}", *[""] * 7])
    rows.append(["goal for (5)", *[""] * 4, *(f"{goal:.2f}" for goal in GOALS.values()), ""])
    return format_table(rows)


def main() -> None:
    """Measure, print, and write the figures down."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count")
    parser.add_argument("--model", help="another encoder than the random ViT-B/16")
    parser.add_argument("--quick", action="store_true", help="a tiny tower: does it run at all?")
    parser.add_argument("--out", type=Path, default=results_path("finetune"))
    options = parser.parse_args()
    name, size_px = ("test_vit", 256) if options.quick else ("vit_base_patch16_224", 2048)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or f"random:{name}"
        bench = Bench(Path(folder), model, options.precision, options.rounds)
        png_bytes = prepare(bench, size_px)
        results = {name: summarise(reports) for name, reports in run_rounds(bench).items()}
    judged, apart = judge(results), disagreement(results)
    machine, elapsed_s = describe_machine(), time.perf_counter() - started
    settings = {
        "encoder": bench.encoder,
        "precision": options.precision,
        "batch_size": BATCH_SIZE,
        "rounds": options.rounds,
        "image_size_px": size_px,
        "png_mb": png_bytes / 1e6,
    }
    decoding = results["files"]["loading_s"] * results["files"]["images_per_s"] / BATCH_SIZE
    print(
        f"{bench.encoder}, {options.precision}, batches of {BATCH_SIZE}, {options.rounds} turns "
        f"each, {machine['threads']} threads on {machine['cores']} cores, {elapsed_s:.0f} s in all"
    )
    print(tabulate(results, judged))
    print(
        f"PNG files of {size_px:,} x {size_px:,} pixels, {png_bytes / 1e6:.2f} MB each; decoding "
        f"takes {decoding:.0%} of (1). Losses of (2), (3) and (4) agree to {apart:.1e}."
    )
    write_json(
        options.out,
        {"machine": machine, "settings": settings, "results": results, "goals": judged}
        | {"loss_disagreement": apart, "elapsed_s": elapsed_s},
    )
    if not apart <= LARGEST_DISAGREEMENT[options.precision]:
        raise SystemExit("The losses differ, so these are not the speeds of equal computations.")


if __name__ == "__main__":
    main()
