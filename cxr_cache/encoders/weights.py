"""Weights of vision towers: read from a checkpoint without running its code, checked and hashed."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cxr_cache.common.wording import first_line, list_names
from cxr_cache.errors import EncoderError

VISION_PREFIX = "visual."
_WRAPPERS = re.compile(r"^(?:module\.|model\.|_orig_mod\.|backbone\.|teacher\.|timm_model\.)+")
"""What training programs put before the names of tensors."""
_CONTAINERS = ("state_dict", "model_state_dict", "model", "teacher", "module")
"""Where training programs keep a model's tensors among other things."""


def load_weights(
    visual: nn.Module,
    path: Path,
    fit: Callable[[nn.Module, dict[str, Tensor]], None] | None = None,
    *,
    is_bare: bool = False,
) -> None:
    """Copy a checkpoint's vision tensors into the tower, and raise unless all of them fit.

    `fit` may change the tensors before.
    """
    named = read_tensors(path, VISION_PREFIX)
    require_usable(named, path)
    tensors = {name.removeprefix(VISION_PREFIX): tensor for name, tensor in named.items()}
    if not tensors:
        raise EncoderError(
            f"{path} holds no tensor named {VISION_PREFIX}*, so it is not a checkpoint of "
            "open_clip. Take the file from the repository that the configuration is from."
        )
    if fit is not None:
        fit(visual, tensors)
    fill_tower(visual, tensors, path, "image", lambda name: [VISION_PREFIX + name], is_bare=is_bare)


def fill_tower(
    tower: nn.Module,
    tensors: dict[str, Tensor],
    path: Path,
    kind: str,
    spell: Callable[[str], Sequence[str]],
    *,
    is_bare: bool = False,
) -> None:
    """Copy a checkpoint's tensors into the image or text tower; every one must have its place.

    `spell` gives the names in the checkpoint of what has one name in the tower, as
    :func:`read_tensors` gives them. The checkpoint `is_bare` where it has no configuration.

    Raises
    ------
    EncoderError
        Naming the tensors that are missing, left over or of another shape, as the file does.
    """
    expected = tower.state_dict()
    # Positions counted from 0, which older versions of transformers wrote into checkpoints.
    tensors = {k: v for k, v in tensors.items() if not k.endswith(".position_ids") or k in expected}
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        lines = _describe_misfit(shapes, tensors, _make_speller(path, spell), path)
        described = "its own tensors describe" if is_bare else "the configuration describes"
        remedy = "Configuration and weights must come from the same model; copy both again."
        if is_bare:
            remedy = (
                "It is half a checkpoint, or of another model than its names tell. Download it "
                "again, or put its config.json beside it."
            )
        raise EncoderError(
            "\n".join([f"{path} does not fit the {kind} tower that {described}:", *lines, remedy])
        )
    tower.load_state_dict(tensors)


def _describe_misfit(
    expected: Mapping[str, torch.Size],
    tensors: Mapping[str, Tensor],
    spell: Callable[[str], Sequence[str]],
    path: Path,
) -> list[str]:
    """Say which tensors are missing, left over or of another shape, by their names in the file."""
    in_file = dict(_read_raw_shapes(path))
    missing, unknown, wrong = [], [], []
    parts: set[str] = set()
    for name in sorted(expected):
        names = spell(name)
        if name in tensors and tensors[name].shape == expected[name]:
            continue
        parts.update(names)
        absent = [each for each in names if each not in in_file]
        if name not in tensors and absent:
            missing += absent
        else:
            found = [str(in_file.get(each, "none")) for each in names]
            wrong.append(
                f"{' + '.join(names)} ({' + '.join(found)} in the file, {tuple(expected[name])} in "
                "the tower)"
            )
    for name in sorted(tensors.keys() - expected.keys()):
        unknown += [each for each in spell(name) if each not in parts]
    problems = {
        "missing in the file": missing,
        "unknown to the tower": unknown,
        "of another shape": wrong,
    }
    return [
        f"  {what}: {list_names(list(dict.fromkeys(names)), 3)}"
        for what, names in problems.items()
        if names
    ]


def _make_speller(
    path: Path, spell: Callable[[str], Sequence[str]]
) -> Callable[[str], Sequence[str]]:
    """Make what names tensors as a file does, with what its training program put before them."""
    raw = {_unwrap(name): name for name, _ in _read_raw_shapes(path)}
    wrappers = Counter(name.removesuffix(bare) for bare, name in raw.items())
    wrapper = wrappers.most_common(1)[0][0] if wrappers else ""
    return lambda name: [raw.get(bare, wrapper + bare) for bare in spell(name)]


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read a checkpoint's tensors whose names begin with `prefix`, without running its code.

    What training programs put before the names is taken off them. `path` may be the list of the
    parts that a checkpoint is kept in, ``model.safetensors.index.json``.

    Raises
    ------
    EncoderError
        A file is missing, damaged, of another kind, or holds more than tensors, or one twice.
    """
    tensors: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for part in list_parts(path):
        read = _read_safetensors if part.suffix == ".safetensors" else _read_pickle
        for name, tensor in read(part, prefix).items():
            bare = _unwrap(name)
            if bare in tensors:
                raise held_twice(path, origins[bare], name)
            tensors[bare], origins[bare] = tensor, name
    return tensors


_FIRST_PARTS = (
    r"patch_embed\.proj\.weight",
    r"embeddings\.(?:cls_token|class_embedding|patch_embedding\.weight)",
    r"visual\.conv1\.weight",
)
"""Names of tensors with which image towers begin, whatever is put before them."""


def explain_prefixes(path: Path) -> str:
    """Say how to take out a tower whose names have something before them; empty if none has."""
    pattern = re.compile(rf"(.*\.)(?:{'|'.join(_FIRST_PARTS)})")
    found = [match[1] for name, _ in _read_raw_shapes(path) if (match := pattern.fullmatch(name))]
    prefixes = list(dict.fromkeys(prefix for prefix in found if _unwrap(prefix)))
    if not prefixes:
        return ""
    return (
        f"An image tower lies under {list_names([f'{each}*' for each in prefixes], 3)}: save the "
        "one that is meant alone, "
        f"torch.save({{k.removeprefix({prefixes[0]!r}): v for k, v in state_dict.items() if "
        f"k.startswith({prefixes[0]!r})}}, 'weights.pt')."
    )


def held_twice(path: Path, first: str, second: str) -> EncoderError:
    """Give the error of a file that holds one tensor under two names."""
    return EncoderError(
        f"{path} holds the same tensor twice, as {first} and as {second}. Take the file from the "
        "model's repository."
    )


def _unwrap(name: str) -> str:
    return _WRAPPERS.sub("", name)


def list_parts(path: Path) -> list[Path]:
    """List the files that a checkpoint is kept in: `path` itself, unless that is a list of parts.

    Raises
    ------
    EncoderError
        The list is damaged, or the file is a pointer of Git LFS.
    """
    if not path.name.endswith(".index.json"):
        _require_no_pointer(path)
        return [path]
    try:
        parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if not parts or any(Path(part).name != part for part in parts):
            raise ValueError(f"parts {parts}")
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(
            f"{path} does not list the parts of a checkpoint ({error!r}). Copy or download it "
            "again."
        ) from error
    return [path.parent / part for part in parts]


def _require_no_pointer(path: Path) -> None:
    """Raise EncoderError for what a clone without Git LFS holds in place of a large file."""
    if not path.is_file():
        return  # whoever reads it says so
    if _read_start(path, 23) == b"version https://git-lfs":
        raise EncoderError(
            f"{path} is a pointer of Git LFS, which stands for the weights until they are "
            "downloaded. Run git lfs pull in its folder, or download the file from the "
            "model's page."
        )


def read_names(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Read the names and shapes of a checkpoint's tensors; names as :func:`read_tensors` has them.

    Raises
    ------
    EncoderError
        As :func:`read_tensors`.
    """
    return [(_unwrap(name), shape) for name, shape in _read_raw_shapes(path)]


def _read_raw_shapes(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Read names and shapes, with what a training program put before the names."""
    if (parts := list_parts(path)) != [path]:
        return [found for part in parts for found in _read_raw_shapes(part)]
    if path.suffix != ".safetensors":
        return [(name, tuple(tensor.shape)) for name, tensor in _read_pickle(path, "").items()]
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
                if _unwrap(name).startswith(prefix)
            }
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path, prefix: str) -> dict[str, Tensor]:
    """Read tensors of a checkpoint of torch; it is memory-mapped, so that others are not read."""
    is_archive = zipfile.is_zipfile(path)
    if is_archive and _holds_program(path):
        raise EncoderError(
            f"{path} is an archive of TorchScript, which holds a program beside the weights. "
            f"Save these alone: torch.save(torch.jit.load({path.name!r}, 'cpu').state_dict(), "
            "'weights.pt')."
        )
    if not is_archive and (start := _read_start(path, 4))[:1] != b"\x80":  # of a pickle
        what = f"begins with {start!r}" if start else "is empty"
        raise EncoderError(
            f"{path} is damaged, or not a checkpoint of torch (it {what}). Copy or download it "
            "again."
        )
    try:
        with torch.serialization.safe_globals([*_numpy_globals(), argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{path} was refused: it is damaged, or holds more than tensors, which could run code "
            f"when loaded ({_refusal(error)}). Use the model's safetensors file, have its weights "
            "saved alone, torch.save(model.state_dict(), 'weights.pt'), or download the file again."
        ) from error
    except Exception as error:  # damaged bytes can raise anything
        raise EncoderError(
            f"{path} is damaged, or not a checkpoint of torch ({first_line(error)}). Copy or "
            "download it again."
        ) from error
    state = checkpoint if isinstance(checkpoint, dict) else {}
    keys: list[str] = []
    while inner := [key for key in _CONTAINERS if isinstance(state.get(key), Mapping)]:
        state = state[inner[0]]
        keys.append(inner[0])
    _require_no_other_container(state, keys, path)
    return {
        str(name): value
        for name, value in state.items()
        if _unwrap(str(name)).startswith(prefix) and isinstance(value, Tensor)
    }


def _require_no_other_container(state: Mapping[Any, Any], keys: list[str], path: Path) -> None:
    """Raise EncoderError where tensors lie deeper, and it is unknown which of them are meant."""
    others = [key for key, value in state.items() if _holds_tensors(value)]
    if others and not _holds_tensors(state):
        where = "".join(f"[{key!r}]" for key in (*keys, others[0]))
        raise EncoderError(
            f"{path} holds tensors under {list_names(list(map(str, others)), 5)}, and under none "
            f"of {', '.join(_CONTAINERS)}, where an encoder is looked for. Save those that are "
            f"meant alone: torch.save(torch.load({path.name!r}, 'cpu'){where}, 'weights.pt')."
        )


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _read_start(path: Path, n_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(n_bytes)
    except OSError as error:
        raise EncoderError(f"{path} cannot be read: {error}.") from error


def _holds_program(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _numpy_globals() -> list[Any]:
    """List what pickled numbers of NumPy are made of, such as a training program's best loss.

    Like the table of a training program's options, which is allowed too, they hold no code. NumPy
    2 has moved the first of them.
    """
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"]
    moved = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*moved, np.dtype, *kinds]


def require_no_adapter(names: Iterable[str], path: Path) -> None:
    """Raise EncoderError where names of tensors are those of an adapter."""
    if adapters := [name for name in names if "lora_" in name]:
        raise EncoderError(
            f"{path} holds an adapter (LoRA: {list_names(adapters, 1)}), which is a change to "
            "another model and no model by itself. Merge the two and save the result."
        )


def require_usable(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise EncoderError where weights are quantised, NaN or infinite, or an adapter's."""
    require_no_adapter(tensors, path)
    require_not_quantised(tensors, path)
    damaged = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if damaged:
        raise EncoderError(
            f"{path} holds NaN or infinity in {list_names(damaged, 3)}. The file is damaged, or "
            "its training diverged; take another one."
        )


def require_not_quantised(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise EncoderError where weights are kept as whole numbers, or as numbers of eight bits."""
    packed = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype not in (torch.int64, torch.bool)  # counts and indices, masks
        and (not tensor.is_floating_point() or tensor.element_size() == 1)
    ]
    if packed:
        raise EncoderError(
            f"{path} holds quantised weights ({list_names(packed, 3)}: "
            f"{tensors[packed[0]].dtype}), from which the original weights cannot be recovered. "
            "Take the model before it was quantised."
        )


class WithoutDrawing(TorchFunctionMode):
    """Where an architecture would draw initial weights, leave its tensors as they are.

    For towers that a checkpoint fills whole: drawing 86 million numbers takes half a second.
    """

    # Of nn.init those that ask whether they are overridden; the others call one of the tensor's.
    _DRAWS: Final = (
        *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_),
        *(nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, nn.init.trunc_normal_),
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func in self._DRAWS:
            return args[0] if args else options["tensor"]
        return func(*args, **options)


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
    # Its first paragraph advises to switch the check off, and what follows a refused name to allow
    # it, which is no advice to hand on
    found = re.search(r"(?:WeightsUnpickler error:\s*|\n\n)(\S.*)", str(error))
    reason = found[1] if found else first_line(error)
    return reason.partition(" was not an allowed global")[0]
