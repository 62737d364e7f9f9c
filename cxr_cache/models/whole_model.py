"""A run and its encoder as one torch module: pixels -> probabilities."""

from __future__ import annotations

import copy
from contextlib import closing
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from cxr_cache.datasets.images import Preprocessing
from cxr_cache.encoders.encoder import Encoder, trainable_parameter_names
from cxr_cache.encoders.towers import run_whole
from cxr_cache.models.heads import HeadBank
from cxr_cache.models.run import SavedModel, read_calibration
from cxr_cache.models.tuned import as_cached, load_members
from cxr_cache.store.features import COLUMNS


def build_whole_model(model: SavedModel, encoder: Encoder) -> nn.Module:
    """The module that gives what :func:`cxr_cache.models.predict.predict_images` gives.

    Parameters
    ----------
    model
        What a run saved, frozen or fine-tuned.
    encoder
        The run's, as it is before fine-tuning, which it stays.

    Returns
    -------
    nn.Module
        In evaluation mode and without gradients: uint8 pixels ``(B, 3, S, S)`` to probabilities
        ``(B, F)``, the members averaged, then calibrated. Plain layers only, for exporters.
    """
    build = _FrozenModel if model.tail is None else _TunedModel
    return build(model, encoder).eval().requires_grad_(False)


def plain_heads(model: SavedModel) -> nn.ModuleList:
    """The members' heads as plain ``nn.Sequential``, in evaluation mode."""
    bank = HeadBank.from_snapshot(model.head_tensors)
    return nn.ModuleList([bank.as_sequential(k) for k in range(bank.n_heads)])


def in_full_precision(model: SavedModel) -> SavedModel:
    """The same model with blocks that compute in float32, whatever they were trained in."""
    return model if model.tail is None else replace(model, tail=model.tail | {"precision": "fp32"})


class _Normalise(nn.Module):
    """:func:`cxr_cache.datasets.images.normalise` with nothing computed in place, for exporters."""

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name)).view(3, 1, 1)
            self.register_buffer(name, values)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std


class _Average(nn.Module):
    """Members' logits to probabilities, averaged, then calibrated."""

    slope: Tensor
    intercept: Tensor

    def __init__(self, model: SavedModel) -> None:
        super().__init__()
        calibration = read_calibration(model.calibration, len(model.findings))
        for name in ("slope", "intercept"):
            self.register_buffer(name, torch.from_numpy(getattr(calibration, name)).float())
        self._calibrates = calibration.method != "none"

    def forward(self, logits: list[Tensor]) -> Tensor:
        mean = torch.stack([torch.sigmoid(one) for one in logits]).mean(dim=0)
        if not self._calibrates:
            return mean
        return torch.sigmoid(self.slope * (torch.log(mean) - torch.log(1 - mean)) + self.intercept)


class _FrozenModel(nn.Module):
    """One encoder, and every member's head on its embedding."""

    def __init__(self, model: SavedModel, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, _folded_heads(model)
        self.normalise = _Normalise(encoder.preprocessing)
        self.average = _Average(model)
        self._input_norm = model.head["input_norm"]
        self._columns = COLUMNS[model.head.get("features", "projected")]

    def forward(self, pixels: Tensor) -> Tensor:
        pooled, embeddings = run_whole(self.encoder.visual, self.normalise(pixels))
        outputs = {"embeddings": embeddings, "pooled": pooled}
        parts = [outputs[name] for name in self._columns]
        if self._input_norm == "l2":
            parts = [F.normalize(part, dim=-1) for part in parts]
        embeddings = torch.cat(parts, dim=-1)
        return cast(Tensor, self.average([head(embeddings) for head in self.heads]))


class _TunedModel(nn.Module):
    """One stem, and every member's blocks and head on its tokens."""

    def __init__(self, model: SavedModel, encoder: Encoder) -> None:
        super().__init__()
        assert model.tail is not None
        self._model, self._n_unfrozen = replace(model, tensors={}), model.tail["unfreeze_layers"]
        self.encoder, self.heads = encoder, _folded_heads(model)
        self.normalise, self.average = _Normalise(encoder.preprocessing), _Average(model)
        with closing(load_members(in_full_precision(model), encoder)) as members:
            self.tails = nn.ModuleList(
                [_copy_with_own_blocks(member.encoder, self._n_unfrozen) for member in members]
            )

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.encoder.stem(self.normalise(pixels), self._n_unfrozen)
        tokens = as_cached(tokens, self._model).float()
        logits = []
        for tail, head in zip(self.tails, self.heads, strict=True):
            _, embeddings = cast(Encoder, tail).tail(tokens, self._n_unfrozen)
            if self._model.head["input_norm"] == "l2":
                embeddings = F.normalize(embeddings, dim=-1)
            logits.append(head(embeddings))
        return cast(Tensor, self.average(logits))


def _folded_heads(model: SavedModel) -> nn.ModuleList:
    """The heads with each batch norm in the layer before it, without dropout.

    In evaluation a norm is a scale and a shift; the exporter of torch 2.6 stumbles over it.
    """
    heads = nn.ModuleList()
    for head in plain_heads(model):
        layers: list[nn.Module] = []
        for layer in head.children():
            if isinstance(layer, nn.BatchNorm1d):
                layers[-1] = fuse_linear_bn_eval(cast(nn.Linear, layers[-1]), layer)
            elif not isinstance(layer, nn.Dropout):
                layers.append(layer)
        heads.append(nn.Sequential(*layers))
    return heads


def _copy_with_own_blocks(encoder: Encoder, n_unfrozen: int) -> Encoder:
    """A copy that shares every tensor but those of the last blocks."""
    own = set(trainable_parameter_names(encoder, n_unfrozen))
    tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    shared = {id(tensor): tensor for name, tensor in tensors.items() if name not in own}
    return copy.deepcopy(encoder, memo=dict(shared))
