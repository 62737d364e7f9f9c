"""A run and images -> maps of where its findings come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cxr_cache.common.wording import list_names
from cxr_cache.datasets.images import decode_image, decode_picture, read_bytes
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.errors import ConfigError, ImageError, RunError
from cxr_cache.metrics.scores import NEVER, UNDECIDED
from cxr_cache.models.heads import HeadBank
from cxr_cache.models.predict import Predictor, require_encoder_of_run, require_one_encoder
from cxr_cache.models.run import Run, SavedModel

DEFAULT_BLOCKS = 2
"""Of a frozen run; of a fine-tuned one it is the blocks that were tuned."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """One image and one finding."""

    path: Path
    finding: str
    probability: float
    threshold: float
    relevance: NDArray[np.float32]
    """Not negative, in no unit, rows and columns of patches."""
    picture: NDArray[np.uint8]
    """The radiograph at full size, ``(H, W)`` or ``(H, W, 3)``."""
    extent: tuple[float, float, float, float]
    """What of the picture the map covers, in its pixels: left, right, bottom, top."""
    is_calibrated: bool = True
    """Whether the run gives probabilities; otherwise they are scores."""

    @property
    def decision(self) -> str:
        """The number that the run gives, and what it means, in words."""
        what, form = ("probability", ".1%") if self.is_calibrated else ("score", ".3f")
        number = f"{what} {self.probability:{form}}"
        if self.threshold >= UNDECIDED:
            return f"{number} (too few to decide)"
        cut = "none: never called" if self.threshold >= NEVER else f"{self.threshold:{form}}"
        called = "present" if self.probability >= self.threshold else "absent"
        return f"{number} (threshold {cut}), {called}"

    def __repr__(self) -> str:
        rows, columns = self.relevance.shape
        height, width = self.picture.shape[:2]
        return (
            f"Explanation of {self.finding} on {self.path}: {self.decision}, a map of {rows} x "
            f"{columns} patches over a picture of {width} x {height} pixels"
        )


def parse_findings(run: Run, names: Sequence[str]) -> list[str]:
    """Findings of a run by their names, in any case.

    Raises
    ------
    ConfigError
        The run has no such finding.
    """
    known = {finding.casefold(): finding for finding in run.config["findings"]}
    unknown = [name for name in names if name.casefold() not in known]
    if unknown:
        raise ConfigError(
            f"{run.path} has no finding {unknown[0]!r}. It has: {list_names(list(known.values()))}."
        )
    return [known[name.casefold()] for name in names]


def explain_images(
    run: Run,
    paths: Sequence[Path],
    findings: Sequence[str],
    encoder: Encoder,
    *,
    n_blocks: int | None = None,
) -> Iterator[Explanation | ImageError]:
    """Maps of images, image by image, finding by finding; for a file that cannot be used, why.

    Parameters
    ----------
    run
        A finished run, frozen or fine-tuned.
    paths
        Image files.
    findings
        Names as :func:`parse_findings` gives them.
    encoder
        The run's.
    n_blocks
        Last blocks that are followed back; None for those that were fine-tuned, or two.

    Raises
    ------
    RunError
        `encoder` is not the run's, or there is none, or several; or the head reads the pooled
        output or whole studies.
    EncoderError
        The tower does not pool its class token alone, cannot be split, or has fewer blocks.

    Examples
    --------
    >>> run = Run.open("runs/tuned")  # doctest: +SKIP
    >>> encoder = load_encoder(run.config["store"]["encoder"]["name"])  # doctest: +SKIP
    >>> for image in explain_images(run, ["chest.png"], ["Cardiomegaly"], encoder):
    ...     print(image)  # doctest: +SKIP
    """
    traced = load_traceable_model(run, encoder)
    model, prep = traced.model, encoder.preprocessing
    calibration = model.operating_point.calibration
    columns = [model.findings.index(finding) for finding in findings]
    for path in paths:
        try:
            data = read_bytes(None, str(path))
            pixels = torch.from_numpy(decode_image(data, prep).pixels[None])
            picture = decode_picture(data, prep.bits_stored)
        except ImageError as error:
            yield ImageError(f"{path}: {error}")
            continue
        maps = traced.map_findings(pixels, columns, n_blocks)
        probabilities = calibration.apply(traced.predictor.from_pixels(pixels))[0].astype(
            np.float32
        )
        for finding, column, one in zip(findings, columns, maps, strict=True):
            yield Explanation(
                path=path,
                finding=finding,
                probability=float(probabilities[column]),
                threshold=model.thresholds[finding],
                relevance=one[0].numpy(),
                picture=picture,
                extent=find_extent(picture.shape[:2], prep.resize, prep.share_seen),
                is_calibrated=calibration.method != "none",
            )


def load_traceable_model(run: Run, encoder: Encoder) -> TraceableModel:
    """Load a run's model to follow its answers back into `encoder`.

    Raises
    ------
    RunError
        `encoder` is not the run's, or there is none, or several; or the head reads the pooled
        output.
    """
    run.require_images("maps of where it looked are of single images")
    model = run.load_model()
    require_one_encoder(run, model, "a map follows one encoder back.")
    require_encoder_of_run(run, model.encoder, encoder)
    if model.features != "projected":
        raise RunError(
            f"{run.path} was trained with --features {model.features}; maps follow the projected "
            "embedding back. Train with --features projected."
        )
    return TraceableModel(model, encoder)


class TraceableModel:
    """A trained model whose answers can be followed back into its encoder.

    It reads the projected embedding. `encoder` is the run's, as it is before fine-tuning, which it
    stays.
    """

    def __init__(self, model: SavedModel, encoder: Encoder) -> None:
        self.model, self.encoder = model, encoder
        self.predictor = Predictor(model, encoder)
        self._towers: list[tuple[Encoder, HeadBank]]  # each with the heads that read its embedding
        if model.tail is None:
            bank = HeadBank.from_snapshot(model.head_tensors, device=encoder.device)
            self._towers, self._n_blocks = [(encoder, bank)], DEFAULT_BLOCKS
        else:
            self._towers = [(one.encoder, one.bank) for one in self.predictor.members]
            self._n_blocks = int(model.tail["unfreeze_layers"])

    def map_findings(
        self, pixels: Tensor, findings: Sequence[int], n_blocks: int | None = None
    ) -> Tensor:
        """Where in the images the logits of some findings come from, averaged over the members.

        Takes pixels ``(B, 3, S, S)`` as :meth:`Encoder.encode` does, and the columns of n findings;
        `n_blocks` and errors are those of :func:`explain_images`. Gives ``(n, B, rows, columns)``
        of patches, not negative, in no unit, on the CPU.
        """
        n_blocks = n_blocks or self._n_blocks
        maps = []
        for encoder, bank in self._towers:
            with torch.no_grad():
                tokens = encoder.stem(encoder.prepare(pixels), n_blocks)
            embeddings, attentions = encoder.tail_with_attention(tokens.requires_grad_(), n_blocks)
            if self.model.head["input_norm"] == "l2":
                embeddings = F.normalize(embeddings, dim=-1)
            for logits in bank(embeddings):  # (B, F) of every head
                of_findings = []
                for f in findings:
                    logit = logits[:, f].sum()
                    gradients = torch.autograd.grad(logit, attentions, retain_graph=True)
                    with torch.no_grad():
                        of_findings.append(roll_out(attentions, gradients))
                maps.append(torch.stack(of_findings).detach())
        rows, columns = self.encoder.patch_grid
        mean = torch.stack(maps).mean(dim=0)[..., -rows * columns :]  # behind any further tokens
        return mean.reshape(*mean.shape[:-1], rows, columns).cpu()


def roll_out(attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Relevance of every token to the class token: gradient-weighted attention, block after block.

    With A a block's attention and G the gradient of the logit with respect to it,

        C = mean over heads of max(A * G, 0),    R <- R + C R,    R = identity at first

    (Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and
    Encoder-Decoder Transformers", ICCV 2021, eq. 5 and 6). Blocks before the first one given are
    taken as mixing nothing. Given is one pair per block, first to last, ``(B, heads, T, T)``; the
    result is the class token's row of R without itself, not negative, ``(B, T - 1)``.
    """
    B, _, T, _ = attentions[0].shape
    relevance = torch.eye(T, device=attentions[0].device).expand(B, T, T)
    for attention, gradient in zip(attentions, gradients, strict=True):
        counted = (attention * gradient).clamp(min=0).mean(dim=1)  # (B, heads, T, T) -> (B, T, T)
        relevance = relevance + counted @ relevance
    return relevance[:, 0, 1:]


def find_extent(
    shape: tuple[int, ...], resize: str, share_seen: float = 1.0
) -> tuple[float, float, float, float]:
    """What of a picture ``(H, W)`` the encoder saw: all of it, or the central square.

    Of either only the middle, where the encoder cuts it out of a larger image: `share_seen` of
    each side. A padded picture is seen with its margins. Gives left, right, bottom and top.
    """
    height, width = shape
    side = max(height, width) if resize == "pad" else min(height, width)
    seen = (height, width) if resize == "squash" else (side, side)
    seen_height, seen_width = (edge * share_seen for edge in seen)
    left, top = (width - seen_width) / 2, (height - seen_height) / 2
    return left, left + seen_width, top + seen_height, top
