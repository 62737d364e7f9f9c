"""A frozen vision tower as an encoder: it runs whole or in two parts and records its identity."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from cxr_cache.common.devices import Precision
from cxr_cache.common.wording import first_line
from cxr_cache.datasets.preprocessing import Preprocessing, normalise
from cxr_cache.encoders.identity import EncoderIdentity
from cxr_cache.encoders.sources import Source
from cxr_cache.encoders.towers import SplitTower, run_whole
from cxr_cache.encoders.weights import hash_tensors
from cxr_cache.errors import EncoderError

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Encoder(nn.Module):
    """A frozen vision tower together with the preprocessing that it expects.

    :func:`cxr_cache.encoders.loading.load_encoder` makes one; `split` is the tower in two halves,
    or None where it cannot be taken apart.

    Parameters are named as in the checkpoint (``visual.trunk.blocks.11.norm1.weight``). They take
    no gradient until a caller asks for it, and stay float32; lower precisions are autocast.

    Attributes
    ----------
    visual
        The tower, as its library builds it.
    preprocessing
        How a file becomes pixels, and pixels become the tower's input.
    precision
        Precision of matrix products: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    identity
        What a store records to know the encoder again.
    """

    identity: EncoderIdentity

    def __init__(
        self,
        visual: nn.Module,
        split: SplitTower | None,
        preprocessing: Preprocessing,
        precision: Precision,
        source: Source,
    ) -> None:
        super().__init__()
        self.visual = visual.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.precision = precision
        self._name = source.name
        self._split = split
        self._compiled: dict[tuple[int, int | None], Callable[..., tuple[Tensor, ...]]] = {}
        self.identity = self._identify(source)

    @property
    def device(self) -> torch.device:
        """Device that holds the weights, to which inputs are moved."""
        return next(self.visual.parameters()).device

    @property
    def is_splittable(self) -> bool:
        """Whether :meth:`stem` and :meth:`tail` exist for this tower."""
        return self._split is not None

    def stem(self, pixels: Tensor, n_unfrozen: int) -> Tensor:
        """Run the frozen part of the tower: everything before the last `n_unfrozen` blocks.

        Takes normalised images, float32, ``(B, 3, S, S)``, and gives the tokens that enter the
        first unfrozen block, float32, ``(B, T, W)``.

        Raises
        ------
        EncoderError
            The tower cannot be split, or has fewer blocks.
        """
        split = self._require_split(n_unfrozen)
        with self._autocast():
            return split.stem(pixels.to(self.device), n_unfrozen).float()

    def tail(
        self,
        tokens: Tensor,
        n_unfrozen: int,
        *,
        precision: Precision | None = None,
        keeps_activations: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Run the end of the tower: the last `n_unfrozen` blocks, pooling and projection.

        Gradients flow to the parameters that ask for them. If the tower pools its class token, the
        last block computes only that token, which changes no result.

        Parameters
        ----------
        tokens, n_unfrozen
            Output of :meth:`stem` for as many blocks, any float type.
        precision
            Precision of matrix products; None for the encoder's own.
        keeps_activations
            False makes a backward pass compute each block again: less memory, more work.

        Returns
        -------
        pooled, embedding
            Outputs before and of the projection, float32, ``(B, P)`` and ``(B, D)``, in the
            encoder's scale, not normalised.

        Raises
        ------
        EncoderError
            The tower cannot be split, or has fewer blocks.
        """
        split = self._require_split(n_unfrozen)
        tokens = tokens.to(self.device, non_blocking=True).float()  # cast after the copy: half size
        with self._autocast(precision):
            pooled, embedding = split.tail(tokens, n_unfrozen, keeps_activations=keeps_activations)
        return pooled.float(), embedding.float()

    def tail_with_attention(self, tokens: Tensor, n_unfrozen: int) -> tuple[Tensor, list[Tensor]]:
        """Compute the embedding of :meth:`tail` in float32, with the attention of every block.

        Anything that is computed from the embedding has gradients for the attention, too. The
        tokens must ask for gradients if no parameter does.

        Returns
        -------
        embedding
            float32, shape ``(B, D)``.
        attentions
            One array per block, first to last, ``(B, heads, T, T)``. The class token is the first
            token, and the patches of :attr:`patch_grid` are the last ones.

        Raises
        ------
        EncoderError
            The tower cannot be split, has fewer blocks, pools other tokens than its class token, or
            has blocks whose attention cannot be shown.
        """
        split = self._require_split(n_unfrozen)
        blocks = split.blocks[len(split.blocks) - n_unfrozen :]
        if not split.reads_class_token_only or not all(map(split.shows_attention, blocks)):
            raise EncoderError(
                f"{self._name} cannot show where it looked: that is read off the class token's "
                "attention, and this tower pools other tokens, or has blocks of its own kind. "
                "Choose a ViT that pools its class token, as BiomedCLIP does, or extract with "
                "--pool cls where it has one."
            )
        return split.tail_with_attention(tokens.to(self.device).float(), n_unfrozen)

    @property
    def tokens_hold_positions(self) -> bool:
        """Whether the tail may be given fewer patches; only for a tower that can be split."""
        return self._require_split(1).tokens_hold_positions

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Number of rows and of columns of patches; only for a tower that can be split."""
        return self._require_split(1).patch_grid

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute pooled output and embedding of images, as the tower's own library does.

        Images are uint8, ``(B, 3, S, S)``, as :func:`cxr_cache.datasets.images.read_image` gives
        them, and are normalised here, on the encoder's device. There the outputs are, too: pooled
        ``(B, P)`` and embedding ``(B, D)``, float32, not normalised. They are equal if the tower
        does not keep the two apart.
        """
        if self.is_splittable:
            return self.encode_with_tokens(pixels, 1)[1:]
        pooled, embedding = self._choose_pass(len(pixels), None)(self.prepare(pixels))
        return pooled, embedding

    @torch.inference_mode()
    def encode_with_tokens(self, pixels: Tensor, n_unfrozen: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compute tokens before the last `n_unfrozen` blocks, pooled output and embedding at once.

        Parameters and shapes are those of :meth:`encode`, :meth:`stem` and :meth:`tail`.
        """
        run = self._choose_pass(len(pixels), n_unfrozen)
        tokens, pooled, embedding = run(self.prepare(pixels))
        return tokens, pooled, embedding

    def _choose_pass(
        self, n_images: int, n_unfrozen: int | None
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Give the forward pass from normalised images: compiled, if it was for so many."""
        own = partial(self._run_split, n_unfrozen) if n_unfrozen else self._run_whole
        return self._compiled.get((n_images, n_unfrozen), own)

    def _run_split(self, n_unfrozen: int, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.stem(images, n_unfrozen)
        return tokens, *self.tail(tokens, n_unfrozen)

    def _run_whole(self, images: Tensor) -> tuple[Tensor, ...]:
        with self._autocast():
            pooled, embedding = run_whole(self.visual, images)
        return pooled.float(), embedding.float()

    def compile_pass(self, n_images: int, n_unfrozen: int | None) -> float:
        """Compile the forward pass for batches of exactly `n_images`; returns the seconds it took.

        Batches of another size are computed as before. The weights are frozen into what is
        compiled, so that :meth:`drop_compiled` must follow before they change. `n_unfrozen` is that
        of :meth:`encode_with_tokens`, or None for :meth:`encode`. What is compiled is for the
        number of threads that the calling thread computes with.

        Raises
        ------
        EncoderError
            There is no compiler on this machine, or it cannot compile this tower.
        """
        _require_compiler(self.device, self._name)
        started = time.perf_counter()
        n_unfrozen = n_unfrozen or (1 if self.is_splittable else None)
        key, side = (n_images, n_unfrozen), self.preprocessing.image_size_px
        try:
            from torch._inductor import config  # as an option, it would come too late for tracing

            run = torch.compile(self._choose_pass(*key), dynamic=False)
            with torch.inference_mode(), config.patch(freezing=True):
                run(self.prepare(torch.zeros(n_images, 3, side, side, dtype=torch.uint8)))
        except Exception as error:  # of the compiler: they have nothing in common
            raise EncoderError(f"{self._name} cannot be compiled: {first_line(error)}.") from error
        self._compiled[key] = run
        return time.perf_counter() - started

    def drop_compiled(self) -> None:
        """Compute as before :meth:`compile_pass`."""
        if self._compiled:
            self._compiled.clear()
            torch._dynamo.reset()  # it would know the code again, and the weights frozen in it

    def prepare(self, pixels: Tensor) -> Tensor:
        """Normalise images as :meth:`encode` takes them into the input of :meth:`stem`."""
        assert pixels.dtype == torch.uint8, f"pixels are {pixels.dtype}, not uint8"
        return normalise(pixels.to(self.device, non_blocking=True), self.preprocessing)

    @contextmanager
    def cast_weights(self) -> Iterator[None]:
        """Hold the weights of matrix products in the encoder's precision while the block runs.

        Without it, autocast casts them to the same bits in every pass. For ViT-B/16 that takes
        0.15 s on one core, in which bf16 instructions encode half an image.
        """
        dtype = _AUTOCAST_DTYPES.get(self.precision)
        plain = (nn.Linear, nn.Conv2d)  # not subclasses, whose code may look at the weights' types
        layers = [module for module in self.visual.modules() if type(module) in plain]
        kept = [(p, p.data) for layer in layers for p in layer.parameters(recurse=False)]
        try:
            for parameter, values in kept if dtype is not None else ():
                parameter.data = values.to(dtype)
            if self._split is not None and (self.precision, self.device.type) == ("bf16", "cpu"):
                self._split.quick_blocks = [self._split.quicken(b) for b in self._split.blocks]
            yield
        finally:
            for parameter, values in kept:
                parameter.data = values
            if self._split is not None:
                self._split.quick_blocks = ()

    def _autocast(self, precision: Precision | None = None) -> torch.autocast:
        dtype = _AUTOCAST_DTYPES.get(precision or self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _require_split(self, n_unfrozen: int) -> SplitTower:
        """Return the split tower, or raise if there is none or it has too few blocks."""
        if self._split is None:
            inner = getattr(self.visual, "trunk", self.visual)
            raise EncoderError(
                f"{self._name} cannot be split into frozen and trainable blocks: its image tower "
                f"is a {type(inner).__name__}, and only plain vision transformers are taken "
                "apart. Extract without --tokens and train heads on its embeddings (train), or "
                "choose a vision transformer."
            )
        n_blocks = len(self._split.blocks)
        if not 1 <= n_unfrozen <= n_blocks:
            raise EncoderError(
                f"{self._name} has {n_blocks} blocks, of which {n_unfrozen} cannot be unfrozen. "
                f"Choose from 1 to {n_blocks}."
            )
        return self._split

    def _identify(self, source: Source) -> EncoderIdentity:
        """Encode one black image, and record the encoder's settings and its outputs' widths."""
        size_px = self.preprocessing.image_size_px
        black = torch.zeros(1, 3, size_px, size_px, dtype=torch.uint8)
        tokens: Tensor | None = None
        try:
            if self.is_splittable:
                tokens, pooled, embedding = self.encode_with_tokens(black, 1)
            else:
                pooled, embedding = self.encode(black)
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            raise EncoderError(
                f"{source.name} cannot encode an image of {size_px} x {size_px} pixels in "
                f"{self.precision} on {self.device}: {error}"
            ) from error
        self._require_usable(pooled, embedding)
        return EncoderIdentity(
            name=source.name,
            revision=source.revision,
            weights_sha256=hash_tensors(self.visual.state_dict()),
            preprocessing=self.preprocessing.to_dict(),
            precision=self.precision,
            n_blocks=None if self._split is None else len(self._split.blocks),
            n_tokens=None if tokens is None else tokens.shape[1],
            token_width=None if tokens is None else tokens.shape[2],
            pooled_width=pooled.shape[1],
            embedding_width=embedding.shape[1],
            is_random=source.weights is None,
            notes=source.notes,
            pool=getattr(self.visual, "pool", "default"),
            positions_from_px=getattr(self.visual, "positions_from_px", None),
        )

    def _require_usable(self, pooled: Tensor, embedding: Tensor) -> None:
        if pooled.ndim != 2 or embedding.ndim != 2:
            raise EncoderError(
                f"{self._name} gives an output of shape {tuple(embedding.shape)} for one image, "
                "not one embedding. Its configuration must pool the tokens, or --pool does, which "
                "is for vision transformers."
            )
        if not embedding.isfinite().all():
            remedy = "" if self.precision == "fp32" else ", or need --precision fp32"
            raise EncoderError(
                f"{self._name} gives NaN or infinity for a black image in {self.precision}. "
                f"The weights are damaged{remedy}."
            )


def _require_compiler(device: torch.device, name: str) -> None:
    """Raise EncoderError where torch.compile would not find its C++ compiler."""
    own = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler, *_ = shlex.split(os.environ.get("CXX", "")) or [own]
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise EncoderError(
            f"{name} cannot be compiled: torch.compile needs a C++ compiler, and there is no "
            f"{compiler} here. Install it, or name another in the environment variable CXX."
        )


def trainable_parameter_names(encoder: Encoder, n_unfrozen: int) -> list[str]:
    """Name the parameters of the last `n_unfrozen` blocks, in the tower's order.

    Fine-tuning trains these blocks only; the final norm and the projection stay frozen.

    Raises
    ------
    EncoderError
        The tower cannot be split, or has fewer blocks.
    """
    blocks = encoder._require_split(n_unfrozen).blocks[-n_unfrozen:]
    chosen = {id(parameter) for block in blocks for parameter in block.parameters()}
    return [name for name, parameter in encoder.named_parameters() if id(parameter) in chosen]
