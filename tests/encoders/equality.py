"""What it means that an encoder computes what its own library computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cxr_cache.encoders.encoder import Encoder, trainable_parameter_names


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def draw_pixels(n_images: int, size_px: int, seed: int = 0) -> Tensor:
    """Blurred noise: smooth as a radiograph is, and different from image to image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n_images, 1, 7, 7, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, size_px, mode="bilinear")
    return smooth.expand(-1, 3, -1, -1).to(torch.uint8)


def disturb(model: Any) -> Any:
    """Give a model seeded weights that all matter: norms, biases and scales, too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def trace(blocks: Iterable[nn.Module], run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """Run a model; give what it gives, and the tokens that enter each of its blocks."""
    entered: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _block, args: entered.append(args[0]))
        for block in blocks
    ]
    try:
        with torch.inference_mode():
            return run(), entered
    finally:
        for handle in handles:
            handle.remove()


def require_equal(
    encoder: Encoder, pixels: Tensor, pooled: Tensor, embedding: Tensor, tokens: Sequence[Tensor]
) -> None:
    """Compare with what another library has: whole, and split at 1, 2 and all blocks.

    `pixels` are uint8 images, and `tokens` enter its blocks, from the first to the last.
    """
    assert relative_error(embedding[:1], embedding[1:]) > 1e-2, "two images look alike"
    assert encoder.identity.n_blocks == len(tokens)
    with torch.inference_mode():
        assert relative_error(encoder.visual(encoder.prepare(pixels)), embedding) < 1e-5
    assert relative_error(encoder.encode(pixels)[1], embedding) < 1e-5
    for n_unfrozen in (1, 2, len(tokens)):
        entering, ours, projected = encoder.encode_with_tokens(pixels, n_unfrozen)
        assert relative_error(entering, tokens[-n_unfrozen]) < 1e-5
        assert relative_error(ours, pooled) < 1e-5
        assert relative_error(projected, embedding) < 1e-5


def require_gradients(encoder: Encoder, pixels: Tensor) -> None:
    """Compare the gradients of a tail of two blocks with autograd's through the whole tower."""
    parameters = dict(encoder.named_parameters())
    trainable = [parameters[n].requires_grad_() for n in trainable_parameter_names(encoder, 2)]
    normalised = encoder.prepare(pixels)
    split = encoder.tail(encoder.stem(normalised, 2), 2)[1].square().sum()
    whole = encoder.visual(normalised).square().sum()
    for ours, theirs in zip(
        torch.autograd.grad(split, trainable), torch.autograd.grad(whole, trainable), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
