"""The last blocks of an encoder and a head as one model: tokens -> logits."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cxr_cache.common.devices import Precision
from cxr_cache.common.distributed import gather_batch, gather_parts, slice_of_process
from cxr_cache.encoders.encoder import Encoder, trainable_parameter_names
from cxr_cache.models.heads import HeadBank
from cxr_cache.models.run import SavedModel
from cxr_cache.store.studies import StudyBatch, StudyTokens, average_views
from cxr_cache.store.tokens import TokenSource

_SCORED_AT_ONCE: Final = 64  # images, whose tokens are on their way together


class TailAndHead(nn.Module):
    """Tokens to logits: the encoder's last blocks, its frozen norm and projection, a head.

    The blocks take gradients, by name; everything else of the encoder stays as it is. They run in
    evaluation mode, as the stem did when the tokens were cached: dropout is the head's.

    Parameters
    ----------
    encoder, n_unfrozen, bank
        The encoder whose last blocks train in place, how many of them, and a bank of one head.
    input_norm
        ``"l2"`` scales embeddings to length 1 before the head, ``"none"`` does not.
    precision, keeps_activations
        As in :meth:`cxr_cache.encoders.encoder.Encoder.tail`; the head computes in float32.
    """

    def __init__(
        self,
        encoder: Encoder,
        bank: HeadBank,
        n_unfrozen: int,
        *,
        input_norm: str = "l2",
        precision: Precision = "fp32",
        keeps_activations: bool = True,
    ) -> None:
        super().__init__()
        assert bank.n_heads == 1, "one head goes with one tail"
        self.encoder, self.bank, self.n_unfrozen = encoder, bank, n_unfrozen
        self._input_norm, self._precision = input_norm, precision
        self._keeps_activations = keeps_activations
        names = trainable_parameter_names(encoder, n_unfrozen)
        encoder.requires_grad_(False)
        self.tail = {name: encoder.get_parameter(name).requires_grad_() for name in names}
        if bank.norm == "batch":  # zero by algebra, noise by rounding: see HeadBank.backward
            for i in range(bank.n_hidden):
                bank.get_parameter(f"bias_{i}").requires_grad_(False)

    def forward(self, batch: Tensor | StudyBatch) -> Tensor:
        """``(B, T, W)`` -> ``(B, F)``; several processes give their parts and all get the whole.

        Of a batch of B studies, the embeddings of their images are averaged before the head.
        """
        tokens, slots = batch if isinstance(batch, StudyBatch) else (batch, None)
        _, embeddings = self.encoder.tail(
            tokens,
            self.n_unfrozen,
            precision=self._precision,
            keeps_activations=self._keeps_activations,
        )
        if self._input_norm == "l2":
            embeddings = F.normalize(embeddings, dim=-1)
        if slots is not None:
            embeddings = average_views(embeddings, slots)
        embeddings = gather_batch(embeddings) if self.training else embeddings
        logits: Tensor = self.bank(embeddings)[0]
        return logits

    def train(self, mode: bool = True) -> TailAndHead:
        """Set the head's mode; the encoder's is evaluation, always."""
        super().train(mode)
        self.encoder.eval()
        return self

    def tensors(self) -> list[Tensor]:
        """Everything that training changes: the blocks, the head, and its running statistics."""
        return [*self.tail.values(), *self.bank.state_dict().values()]

    def snapshot(self) -> dict[str, Tensor]:
        """Copy of everything that trains, on the CPU; axis 0 has length 1, for one model."""
        tail = {name: tensor.detach()[None] for name, tensor in self.tail.items()}
        return {
            name: tensor.cpu().clone() for name, tensor in (tail | self.bank.snapshot()).items()
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`snapshot` gave."""
        for name, parameter in self.tail.items():
            parameter.copy_(state[name][0])
        self.bank.load_state_dict({k: v for k, v in state.items() if k not in self.tail})

    @torch.no_grad()
    def probabilities(
        self, source: TokenSource | StudyTokens, rows: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Of the upright view of some images or studies, ``(n, F)``; processes share the work."""
        return torch.sigmoid(self.logits(source, rows)).cpu().numpy()

    @torch.no_grad()
    def logits(self, source: TokenSource | StudyTokens, rows: NDArray[np.int64]) -> Tensor:
        """The same before the sigmoid, on the encoder's device."""
        self.eval()
        own = torch.from_numpy(rows[slice_of_process(len(rows))])
        batches = source.batches(own, torch.zeros_like(own), _SCORED_AT_ONCE)
        n_findings = self.bank.widths[-1]
        parts = [torch.empty(0, n_findings, device=self.encoder.device), *map(self, batches)]
        return gather_parts(torch.cat(parts), len(rows))


def load_members(model: SavedModel, encoder: Encoder) -> list[TailAndHead]:
    """The members of a fine-tuned model, ready to predict for any number of batches.

    Each has a copy of the encoder that shares every tensor but those of the tuned blocks, which are
    the model's own: nothing is held twice, and `encoder` stays as it is.
    """
    assert model.tail is not None, "a frozen run has no blocks of its own"
    n_unfrozen = model.tail["unfreeze_layers"]
    tail_tensors, head_tensors = (
        {name: tensor.to(encoder.device) for name, tensor in tensors.items()}
        for tensors in (model.tail_tensors, model.head_tensors)
    )
    shared = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
    members = []
    for k in range(model.n_members):
        blocks = {
            id(encoder.get_parameter(name)): nn.Parameter(tail_tensors[name][k])
            for name in trainable_parameter_names(encoder, n_unfrozen)
        }
        member = TailAndHead(
            copy.deepcopy(encoder, memo=shared | blocks),
            HeadBank.from_snapshot(
                {name: tensor[k : k + 1] for name, tensor in head_tensors.items()},
                device=encoder.device,
            ),
            n_unfrozen,
            input_norm=model.head["input_norm"],
            precision=model.tail["precision"],
        )
        members.append(member.eval().requires_grad_(False))
    return members


def as_cached(tokens: Tensor, model: SavedModel) -> Tensor:
    """Tokens as the model was trained on them: rounded to the number format of its store."""
    assert model.tail is not None, "a frozen run reads no tokens"
    return tokens.to(getattr(torch, model.tail["tokens"]))


def name_blocks(parameters: Iterable[str]) -> list[str]:
    """``visual.trunk.blocks.10.norm1.weight`` -> ``visual.trunk.blocks.10``, each block once."""
    found = (re.match(r".*?\.\d+", name) for name in parameters)
    return list(dict.fromkeys(match[0] for match in found if match))


def copy_tail(encoder: Encoder, n_unfrozen: int) -> dict[str, Tensor]:
    """The last blocks as they are now, by parameter name."""
    return {
        name: encoder.get_parameter(name).detach().clone()
        for name in trainable_parameter_names(encoder, n_unfrozen)
    }
