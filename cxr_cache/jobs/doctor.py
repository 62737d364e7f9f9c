"""What works on this machine and in this folder, and what does not: the command `doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from cxr_cache import __version__
from cxr_cache.common.extras import EXTRAS, missing_packages, pip_line
from cxr_cache.common.files import free_bytes
from cxr_cache.common.wording import count, first_line, list_names, package_versions

Status = Literal["ok", "note", "broken"]

_MARKS: Final = {"ok": "ok", "note": "--", "broken": "BROKEN"}
_LOW_SPACE: Final = 10 * 2**30
_OTHERS_LOCK: Final = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        sys.exit(3 if error.errno in (11, 13, 35) else 4)
"""
"""Tries to take a lock that another process holds: 3 if it is refused, as it should be."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    status: Status
    """``"note"`` is what one may want to change and need not; ``"broken"`` stops the main job."""
    message: str
    facts: dict[str, Any] = field(default_factory=dict)
    """The same for programs."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was tried, in the order in which one would mend it."""

    folder: Path
    checks: tuple[Check, ...]

    @property
    def is_working(self) -> bool:
        """Whether the main job can run: no check is broken."""
        return all(check.status != "broken" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """All facts, JSON-able."""
        return {
            "status": "ok" if self.is_working else "broken",
            "cxr_cache": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "folder": str(self.folder),
            "checks": [vars(check) for check in self.checks],
        }

    def to_text(self) -> str:
        """One line per check, for one screen."""
        width = max(len(check.name) for check in self.checks)
        lines = [
            f"cxr-cache {__version__}, Python {platform.python_version()}, {platform.platform()}"
        ]
        lines += [
            f"  {_MARKS[check.status]:<6}  {check.name:<{width}}  {check.message}"
            for check in self.checks
        ]
        broken = [check.name for check in self.checks if check.status == "broken"]
        lines.append(
            f"Broken: {list_names(broken)}. Nothing that needs this will run."
            if broken
            else "All that the main job needs works here."
        )
        return "\n".join(lines)


def diagnose(folder: str | Path = ".") -> Diagnosis:
    """Try what the package needs, on this machine and in this folder; nothing is left there.

    Nothing is asked of the network. A check that fails in an unforeseen way is broken, with what
    was said, and the others go on.

    Parameters
    ----------
    folder
        Where stores and runs would be written.
    """
    folder = Path(folder).resolve()
    checks = [_attempt(name, check) for name, check in _CHECKS.items()]
    checks += [_attempt("disk", lambda: _check_disk(folder))]
    checks += [_attempt("file locks", lambda: _check_locks(folder))]
    checks += [_check_extra(name) for name in EXTRAS]
    return Diagnosis(folder, tuple(checks))


def _attempt(name: str, check: Callable[[], tuple[Status, str, dict[str, Any]]]) -> Check:
    try:
        return Check(name, *check())
    except Exception as error:  # an installation can be broken in any way
        return Check(name, "broken", first_line(error), {"error": repr(error)})


def _check_packages() -> tuple[Status, str, dict[str, Any]]:
    """Versions of all that the package cannot do without, against what it asks for."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("cxr-cache") or []
    except importlib.metadata.PackageNotFoundError:
        return "note", "cxr-cache is used from its folder, so nobody knows what it needs", {}
    found: dict[str, Any] = {}
    wrong = []
    for one in map(Requirement, required):
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        found[one.name] = version = package_versions(one.name).get(one.name)
        if version is None or not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{one.name}{one.specifier} (here: {version or 'none'})")
    if wrong:
        message = f"missing or too old: {list_names(wrong)}. Install cxr-cache again with pip"
        return "broken", message, {"versions": found}
    return "ok", f"the {len(found)} packages that it needs are installed", {"versions": found}


def _check_torch() -> tuple[Status, str, dict[str, Any]]:
    """Whether torch and torchvision fit: an operator of the one is called through the other."""
    import torch
    import torchvision

    facts = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    torchvision.ops.nms(box, torch.ones(1), 0.5)  # fails where they were built for each other not
    importlib.import_module("open_clip")
    facts |= package_versions("open-clip-torch", "timm")
    return "ok", f"{torch.__version__} and torchvision {torchvision.__version__} match", facts


def _check_device() -> tuple[Status, str, dict[str, Any]]:
    import torch

    from cxr_cache.common.devices import resolve_device

    gpus: list[dict[str, Any]] = [
        {"name": torch.cuda.get_device_name(i), "memory_bytes": _gpu_memory(i)}
        for i in range(torch.cuda.device_count())
    ]
    chosen = resolve_device("auto").type
    facts: dict[str, Any] = {"auto": chosen, "gpus": gpus, "cuda": torch.version.cuda}
    if gpus:
        shown = [f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" for gpu in gpus]
        return "ok", f"{chosen}: {'; '.join(shown)}", facts
    built = "built for CUDA" if torch.version.cuda else "built without CUDA"
    if chosen == "mps":
        return "ok", "mps, the GPU of this Mac", facts
    return "note", f"cpu; no GPU is seen (torch is {built})", facts


def _gpu_memory(index: int) -> int:
    import torch

    return int(torch.cuda.get_device_properties(index).total_memory)


def _check_processor() -> tuple[Status, str, dict[str, Any]]:
    """Cores, threads, memory, and which number formats are computed natively."""
    import joblib
    import torch

    from cxr_cache.common.devices import free_ram_bytes, resolve_device, resolve_precision

    has = {
        name: bool(getattr(torch.cpu, f"_is_{name}_supported", bool)())
        for name in ("avx512_bf16", "amx_tile")
    }
    facts: dict[str, Any] = {
        "cores": joblib.cpu_count(),  # those that this process may use
        "torch_threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "free_memory_bytes": free_ram_bytes(),
        "bf16_is_native": resolve_precision("auto", resolve_device("auto")) == "bf16",
        **has,
    }
    how = [name for name, is_there in has.items() if is_there]
    native = f"native ({', '.join(how) or 'GPU'})" if facts["bf16_is_native"] else "emulated, slow"
    message = (
        f"{count(facts['cores'], 'core')}, {count(facts['torch_threads'], 'thread')} of torch, "
        f"{facts['free_memory_bytes'] / 2**30:.1f} GiB of free memory; bf16: {native}"
    )
    return "ok", message, facts


def _check_hdf5() -> tuple[Status, str, dict[str, Any]]:
    """Whether a file that is written can be read."""
    import h5py
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "written.h5")
        with h5py.File(path, "w") as file:
            file["values"] = np.arange(8)
        with h5py.File(path, "r") as file:
            is_equal = bool((file["values"][:] == np.arange(8)).all())
    locking = os.environ.get("HDF5_USE_FILE_LOCKING")
    facts = {
        "hdf5": h5py.version.hdf5_version,
        "h5py": h5py.__version__,
        "HDF5_USE_FILE_LOCKING": locking,
    }
    if not is_equal:
        return "broken", "a file that was written reads otherwise", facts
    how = f"HDF5_USE_FILE_LOCKING={locking}" if locking else "its file locking is the default"
    return "ok", f"HDF5 {facts['hdf5']} (h5py {h5py.__version__}); {how}", facts


def _check_hub() -> tuple[Status, str, dict[str, Any]]:
    """Where encoders are kept, and whether the default one is there already."""
    from huggingface_hub import constants, try_to_load_from_cache

    from cxr_cache.config import EncoderOptions
    from cxr_cache.encoders.catalogue.known import find_known

    folder = Path(constants.HF_HUB_CACHE)
    known = find_known(EncoderOptions.name)
    repo, _, revision = known.model.removeprefix("hf-hub:").partition("@") if known else ("",) * 3
    is_there = bool(repo) and isinstance(
        try_to_load_from_cache(repo, "open_clip_config.json", revision=revision or None), str
    )
    there = next(each for each in (folder, *folder.parents) if each.exists())
    facts: dict[str, Any] = {
        "folder": str(folder),
        "is_writable": os.access(there, os.W_OK),
        "is_offline": bool(constants.HF_HUB_OFFLINE),
        "holds_default_encoder": is_there,
        "free_bytes": free_bytes(there),
    }
    says = [str(folder)]
    says += [] if facts["is_writable"] else ["not writable"]
    says += ["offline (HF_HUB_OFFLINE)"] if facts["is_offline"] else []
    says += [f"holds {EncoderOptions.name}" if is_there else f"{EncoderOptions.name} is not in it"]
    says += [_describe_space(facts["free_bytes"])]
    may_fetch = facts["is_writable"] and not facts["is_offline"]
    return "ok" if is_there or may_fetch else "note", ", ".join(says), facts


def _check_disk(folder: Path) -> tuple[Status, str, dict[str, Any]]:
    free = free_bytes(folder)
    facts = {"free_bytes": free, "is_writable": os.access(folder, os.W_OK)}
    is_short = free is not None and free < _LOW_SPACE
    says = f"{folder}: {_describe_space(free)}"
    if not facts["is_writable"]:
        return "note", f"{says}, not writable: write stores and runs elsewhere", facts
    return "note" if is_short else "ok", says, facts


def _describe_space(free: int | None) -> str:
    return "free space unknown" if free is None else f"{free / 2**30:,.1f} GiB free"


def _check_locks(folder: Path) -> tuple[Status, str, dict[str, Any]]:
    """Whether a second process is kept from what a first one has locked."""
    import fcntl

    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".cxr-cache-doctor-") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tried = [sys.executable, "-I", "-S", "-c", _OTHERS_LOCK, file.name]
            status = subprocess.run(tried, capture_output=True, check=False).returncode
    except OSError as error:
        message = f"cannot be tried in {folder}: {error.strerror}. See to it that only one writes"
        return "note", message, {"works": None}
    if status == 3:
        return "ok", "a second writer is kept out", {"works": True}
    message = "this file system does not keep a second writer out: see to it that only one writes"
    return "note", message, {"works": False}


def _check_extra(name: str) -> Check:
    extra, missing = EXTRAS[name], missing_packages(name)
    versions = package_versions(*extra.packages)
    facts = {"is_installed": not missing, "gives": extra.gives, "versions": versions}
    if missing:
        return Check(f"[{name}]", "note", f"{pip_line(name)}   for {extra.gives}", facts)
    return Check(f"[{name}]", "ok", f"installed, for {extra.gives}", facts)


_CHECKS: Final[dict[str, Callable[[], tuple[Status, str, dict[str, Any]]]]] = {
    "packages": _check_packages,
    "torch": _check_torch,
    "device": _check_device,
    "processor": _check_processor,
    "HDF5": _check_hdf5,
    "encoders": _check_hub,
}
