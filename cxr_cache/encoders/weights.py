"""Weights of vision towers: read from a checkpoint without running its code, checked and hashed."""

from __future__ import annotations

import hashlib
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cxr_cache.common.wording import first_line, list_names
from cxr_cache.errors import EncoderError

_VISION_PREFIX = "visual."


def load_weights(visual: nn.Module, path: Path) -> None:
    """Copy a checkpoint's vision tensors into the tower, and raise unless all of them fit."""
    tensors = {
        name.removeprefix(_VISION_PREFIX): tensor
        for name, tensor in read_tensors(path, _VISION_PREFIX).items()
    }
    if not tensors:
        raise EncoderError(
            f"{path} holds no tensor named {_VISION_PREFIX}*, so it is not a checkpoint of "
            "open_clip. Take the file from the repository that the configuration is from."
        )
    fill_tower(visual, tensors, path, "image")


def fill_tower(tower: nn.Module, tensors: dict[str, Tensor], path: Path, kind: str) -> None:
    """Copy a checkpoint's tensors into the image or text tower; every one must have its place.

    Raises
    ------
    EncoderError
        Naming the tensors that are missing, left over or of another shape.
    """
    expected = tower.state_dict()
    # Positions counted from 0, which older versions of transformers wrote into checkpoints.
    tensors = {k: v for k, v in tensors.items() if not k.endswith(".position_ids") or k in expected}
    problems = {
        "missing in the file": sorted(expected.keys() - tensors.keys()),
        "unknown to the tower": sorted(tensors.keys() - expected.keys()),
        "of another shape": [
            f"{name} ({tuple(tensors[name].shape)} in the file, "
            f"{tuple(expected[name].shape)} in the tower)"
            for name in sorted(expected.keys() & tensors.keys())
            if tensors[name].shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        lines = [f"  {what}: {list_names(names, 3)}" for what, names in problems.items() if names]
        raise EncoderError(
            f"{path} does not fit the {kind} tower that the configuration describes:\n"
            + "\n".join(lines)
            + "\nConfiguration and weights must come from the same model; copy both again."
        )
    tower.load_state_dict(tensors)


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read a checkpoint's tensors whose names begin with `prefix`, without running its code.

    Raises
    ------
    EncoderError
        The file is damaged, of another kind, or holds more than tensors.
    """
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    return read(path, prefix)


def read_names(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Read the names and shapes of a checkpoint's tensors.

    Raises
    ------
    EncoderError
        As :func:`read_tensors`.
    """
    if path.suffix != ".safetensors":
        return [(name, tuple(t.shape)) for name, t in read_tensors(path).items()]
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return [(name, tuple(file.get_slice(name).get_shape())) for name in names]
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> EncoderError:
    return EncoderError(
        f"{path} is damaged, or not a safetensors file ({error}). Copy or download it again."
    )


def _read_safetensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Read tensors of a safetensors file; the bytes of other tensors are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 -- the file is no mapping
                if name.startswith(prefix)
            }
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path, prefix: str) -> dict[str, Tensor]:
    """Read tensors of a checkpoint of torch; it is memory-mapped, so that others are not read."""
    try:
        checkpoint = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{path} was refused: it is damaged, or holds more than tensors, which could run code "
            f"when loaded ({_refusal(error)}). Use the model's safetensors file, or download the "
            "file again."
        ) from error
    except Exception as error:  # damaged bytes can raise anything
        raise EncoderError(
            f"{path} is damaged, or not a checkpoint of torch ({first_line(error)}). Copy or "
            "download it again."
        ) from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    named = {str(name).removeprefix("module."): value for name, value in state.items()}
    return {
        name: value
        for name, value in named.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }


def require_numbers(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise EncoderError where weights are quantised, NaN or infinite."""
    packed = [
        name
        for name, tensor in tensors.items()
        if not name.endswith(("position_ids", "num_batches_tracked"))
        and (not tensor.is_floating_point() or tensor.element_size() == 1)
    ]
    if packed:
        raise EncoderError(
            f"{path} holds quantised weights ({list_names(packed, 3)}: "
            f"{tensors[packed[0]].dtype}), from which the tower's own cannot be had back. Take "
            "the model that it was made from."
        )
    damaged = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if damaged:
        raise EncoderError(
            f"{path} holds NaN or infinity in {list_names(damaged, 3)}. The file is damaged, or "
            "its training diverged; take another one."
        )


def fill_with_noise(visual: nn.Module, seed: int) -> None:
    """Fill every matrix with seeded uniform noise of unit gain; leave norms and biases as built.

    Architectures are initialised differently, some with blocks that do nothing. Filled with noise,
    every tower mixes its image. The bytes are equal on every processor, since torch's uniform
    numbers are integers scaled by a power of two, and the bound rounds once. (Normal numbers need a
    logarithm, whose last bit depends on the processor's instructions.)
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            if parameter.ndim >= 2:
                # Class token and positions, (1, T, W), are inputs themselves, so nothing fans in.
                fan_in = 1 if len(parameter) == 1 else parameter[0].numel()
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.copy_((noise * 2 - 1) * math.sqrt(3 / fan_in))  # variance 1 / fan-in
            elif name.endswith("gamma"):
                parameter.fill_(1)  # layer scale, which some architectures start at 1e-5


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refusal(error: Exception) -> str:
    """Extract the part of torch's long message that says what was refused."""
    found = re.search(r"WeightsUnpickler error: (.*)", str(error))
    return found[1] if found else first_line(error)
