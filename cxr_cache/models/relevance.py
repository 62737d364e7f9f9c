"""Attention and its gradients -> how much each patch of an image counts for a finding."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

import torch
import torch.nn.functional as F
from torch import Tensor

from cxr_cache.encoders.encoder import Encoder
from cxr_cache.models.heads import HeadBank
from cxr_cache.models.run import SavedModel
from cxr_cache.models.tuned import load_members


def roll_out(attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Relevance of every token to the class token: gradient-weighted attention, block after block.

    With A a block's attention and G the gradient of the logit with respect to it,

        C = mean over heads of max(A * G, 0),    R <- R + C R,    R = identity at first

    (Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and
    Encoder-Decoder Transformers", ICCV 2021, eq. 5 and 6). Blocks before the first one given are
    taken as mixing nothing.

    Parameters
    ----------
    attentions, gradients
        One pair per block, first to last, ``(B, heads, T, T)``.

    Returns
    -------
    Tensor
        The class token's row of R without itself, not negative, ``(B, T - 1)``.
    """
    B, _, T, _ = attentions[0].shape
    relevance = torch.eye(T, device=attentions[0].device).expand(B, T, T)
    for attention, gradient in zip(attentions, gradients, strict=True):
        counted = (attention * gradient).clamp(min=0).mean(dim=1)  # (B, heads, T, T) -> (B, T, T)
        relevance = relevance + counted @ relevance
    return relevance[:, 0, 1:]


def map_findings(
    model: SavedModel, encoder: Encoder, pixels: Tensor, findings: Sequence[int], n_blocks: int
) -> Tensor:
    """Where in the images the logits of some findings come from.

    Parameters
    ----------
    model
        What a run saved, frozen or fine-tuned; the maps of its members are averaged.
    encoder
        The run's, as it is before fine-tuning, which it stays.
    pixels
        As :meth:`Encoder.encode` takes them, ``(B, 3, S, S)``.
    findings
        Their columns, n of them.
    n_blocks
        Last blocks that are followed back.

    Returns
    -------
    Tensor
        Not negative, in no unit, ``(n, B, rows, columns)`` of patches, on the CPU.

    Raises
    ------
    EncoderError
        The tower does not pool its class token alone, cannot be split, or has fewer blocks.
    """
    maps = []
    with closing(_members(model, encoder)) as members:
        for bank, k in members:
            with torch.no_grad():
                tokens = encoder.stem(encoder.prepare(pixels), n_blocks)
            embeddings, attentions = encoder.tail_with_attention(tokens.requires_grad_(), n_blocks)
            if model.head["input_norm"] == "l2":
                embeddings = F.normalize(embeddings, dim=-1)
            logits = bank(embeddings)[k]  # (B, F)
            of_findings = []
            for f in findings:
                gradients = torch.autograd.grad(logits[:, f].sum(), attentions, retain_graph=True)
                with torch.no_grad():
                    of_findings.append(roll_out(attentions, gradients))
            maps.append(torch.stack(of_findings).detach())
    rows, columns = encoder.patch_grid
    mean = torch.stack(maps).mean(dim=0)[..., -rows * columns :]  # behind any further tokens
    return mean.reshape(*mean.shape[:-1], rows, columns).cpu()


def _members(model: SavedModel, encoder: Encoder) -> Generator[tuple[HeadBank, int], None, None]:
    """The bank and place of each member's head, while the encoder's blocks are that member's."""
    if model.tail is not None:
        with closing(load_members(model, encoder)) as members:
            for member in members:
                yield member.bank, 0
        return
    bank = HeadBank.from_snapshot(model.head_tensors, device=encoder.device)
    for k in range(bank.n_heads):
        yield bank, k
