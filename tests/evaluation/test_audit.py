"""Files from strangers, read while an audit hook watches: nothing is executed or opened outside.

Python reports to the hook whatever it opens, imports, executes or starts. Libraries in other
languages do not (libhdf5, safetensors, torch's own reader), so the kernel watches the bait, too.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save

from cxr_cache.cli.main import cli
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import CxrCacheError
from cxr_cache.models.run import Run, SavedModel
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.importing import import_embeddings
from tests import small_stores
from tests.encoders.test_encoder import TIMM_VIT, write_open_clip_model

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (sys.prefix, sys.base_prefix, str(ROOT / "cxr_cache"), "/usr/lib", "/lib")
GPU_LIBRARY = "libnvidia-ml.so.1"
WEIGHTS = "open_clip_pytorch_model.bin"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify and /proc are Linux's")


class Payload:
    """Unpickled, it leaves a folder behind, outside of the folder that is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


# --- files that want to do something ----------------------------------------------------------
#
# Each maker gets a folder with the sound file in it, the payload, and the bait: a file outside
# that nobody may open.

Make = Callable[[Path, Payload, Path], object]


def in_store(act: Callable[[h5py.File, Path], object]) -> Make:
    def make(folder: Path, _: Payload, bait: Path) -> None:
        with h5py.File(folder / "s.h5", "r+") as file:
            del file["embeddings"]
            act(file, bait)

    return make


def external_storage(file: h5py.File, bait: Path) -> None:
    place = [(str(bait), 0, h5py.h5f.UNLIMITED)]
    file.create_dataset("embeddings", (20, 1, 8), "f4", external=place)


def virtual(file: h5py.File, bait: Path) -> None:
    layout = h5py.VirtualLayout((20, 1, 8), "f4")
    layout[:] = h5py.VirtualSource(str(bait), "embeddings", (20, 1, 8))
    file.create_virtual_dataset("embeddings", layout)


def external_link(file: h5py.File, bait: Path) -> None:
    file["embeddings"] = h5py.ExternalLink(str(bait), "/embeddings")


def pickled_attribute(folder: Path, payload: Payload, _: Path) -> None:
    with h5py.File(folder / "s.h5", "r+") as file:
        file.attrs["encoder"] = np.void(pickle.dumps(payload))


def as_pickle(name: str, protocol: int = 4) -> Make:
    """The file itself is a pickle, whatever its name says."""
    return lambda folder, payload, _: (folder / name).write_bytes(
        pickle.dumps(payload, protocol=protocol)
    )


def npz(**arrays: Callable[[Payload], Any]) -> Make:
    def make(folder: Path, payload: Payload, _: Path) -> None:
        sound = dict(np.load(folder / "e.npz"))
        np.savez(folder / "e.npz", **sound | {k: array(payload) for k, array in arrays.items()})

    return make


def code_in_a_header(folder: Path, payload: Payload, _: Path) -> None:
    """numpy evaluates the header of an array, which should take literals only."""
    code = f"__import__('os').mkdir({str(payload.path)!r})"
    header = f"{{'descr': {code}, 'fortran_order': False, 'shape': (2,)}}".ljust(117) + "\n"
    array = b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(8)
    rewrite_zip(folder / "e.npz", {"image_id.npy": array})


def members_outside(folder: Path, _: Payload, bait: Path) -> None:
    rewrite_zip(folder / "e.npz", {"../../x.npy": b"x", str(bait): b"overwritten"})


def rewrite_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (kept | members).items():
            archive.writestr(name, data)


def checkpoint(content: Callable[[Payload], Any], **options: Any) -> Make:
    """Torch's own kind of file in place of the weights."""

    def make(folder: Path, payload: Payload, _: Path) -> None:
        tensors = load_file(folder / "open_clip_model.safetensors")
        (folder / "open_clip_model.safetensors").unlink()
        torch.save(tensors | content(payload), folder / WEIGHTS, **options)

    return make


def instead_of_weights(make: Make) -> Make:
    def replace(folder: Path, payload: Payload, bait: Path) -> None:
        (folder / "open_clip_model.safetensors").unlink()
        make(folder, payload, bait)

    return replace


def command_in_text(folder: Path, payload: Payload, _: Path) -> None:
    """The oldest trick: a pickle written by hand."""
    command = f"mkdir {payload.path}"
    (folder / WEIGHTS).write_bytes(b"cos\nsystem\n(S" + repr(command).encode() + b"\ntR.")


def torchscript(folder: Path, payload: Payload, bait: Path) -> None:
    """An archive that torch takes for a program of its own, by the name of a member."""
    checkpoint(lambda _: {})(folder, payload, bait)
    rewrite_zip(folder / WEIGHTS, {f"{Path(WEIGHTS).stem}/constants.pkl": pickle.dumps(payload)})


def configured(**vision: Any) -> Make:
    def make(folder: Path, _: Payload, __: Path) -> None:
        path = folder / "open_clip_config.json"
        config = json.loads(path.read_text())
        config["model_cfg"]["vision_cfg"] |= vision
        path.write_text(json.dumps(config))

    return make


def model(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Make:
    """A model of a run, with what it says about itself replaced or added."""

    def make(folder: Path, _: Payload, __: Path) -> None:
        path = folder / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            known = file.metadata()
        path.write_bytes(save(load_file(path) | tensors, known | metadata))

    return make


def text(name: str, form: str) -> Make:
    return lambda folder, payload, bait: (folder / name).write_text(
        form.format(marker=payload.path, bait=bait)
    )


def untouched(*_: object) -> None:
    """As it was made."""


# --- how they are read ------------------------------------------------------------------------


def read_store(folder: Path) -> None:
    """By a command, then by the library, which is what refuses."""
    CliRunner().invoke(cli, ["inspect", str(folder / "s.h5")])
    CliRunner().invoke(cli, ["verify", str(folder / "s.h5")])
    with FeatureStore.open(folder / "s.h5") as store:
        store.check_rows(np.arange(len(store)))


def read_npz(folder: Path) -> None:
    cohort = small_stores.make_cohort(2)
    import_embeddings(folder / "e.npz", cohort, folder / "imported.h5", overwrite=True)


def read_encoder(folder: Path) -> None:
    load_encoder(f"local-dir:{folder}", device="cpu", precision="fp32")


def read_run(folder: Path) -> None:
    run = Run.open(folder)
    run.load_model()
    assert run.thresholds
    run.read_table("predictions")


def unpickle(folder: Path) -> None:
    """What the package never does."""
    pickle.loads((folder / "x.pkl").read_bytes())


def start_a_program(_: Path) -> None:
    os.system("true")


def open_bait_natively(folder: Path) -> None:
    with safe_open(folder.parent / "bait", framework="np"):
        pass


def write_outside(folder: Path) -> None:
    (folder.parent / "written").write_text("x")


READERS: dict[str, Callable[[Path], None]] = {
    "store": read_store,
    "npz": read_npz,
    "encoder": read_encoder,
    "run": read_run,
}
SOUND: dict[str, tuple[str, Make]] = {f"sound {kind}": (kind, untouched) for kind in READERS}
REFUSED: dict[str, tuple[str, Make]] = {
    "store: external storage": ("store", in_store(external_storage)),
    "store: virtual dataset": ("store", in_store(virtual)),
    "store: external link": ("store", in_store(external_link)),
    "store: pickled attribute": ("store", pickled_attribute),
    "store: a pickle": ("store", as_pickle("s.h5")),
    "npz: payload among the ids": (
        "npz",
        npz(image_id=lambda payload: np.array([payload, "a"], dtype=object)),
    ),
    "npz: payload among the embeddings": (
        "npz",
        npz(embeddings=lambda payload: np.array([[payload], [1.0]], dtype=object)),
    ),
    "npz: code in a header": ("npz", code_in_a_header),
    "npz: a pickle": ("npz", as_pickle("e.npz")),
    "encoder: payload in a checkpoint": ("encoder", checkpoint(lambda payload: {"x": payload})),
    "encoder: payload in an old checkpoint": (
        "encoder",
        checkpoint(lambda payload: {"x": payload}, _use_new_zipfile_serialization=False),
    ),
    "encoder: a module": ("encoder", checkpoint(lambda _: {"x": torch.nn.Linear(1, 1)})),
    "encoder: a pickle": ("encoder", instead_of_weights(as_pickle(WEIGHTS))),
    "encoder: an old pickle": ("encoder", instead_of_weights(as_pickle(WEIGHTS, protocol=0))),
    "encoder: a command": ("encoder", instead_of_weights(command_in_text)),
    "encoder: TorchScript": ("encoder", torchscript),
    "encoder: a pickle named safetensors": ("encoder", as_pickle("open_clip_model.safetensors")),
    "encoder: another hub's tower": (
        "encoder",
        configured(timm_model_name="hf-hub:someone/else"),
    ),
    "run: a pickle named safetensors": ("run", as_pickle("model.safetensors")),
    "run: a header of 2^60 bytes": (
        "run",
        lambda folder, *_: (folder / "model.safetensors").write_bytes(
            (1 << 60).to_bytes(8, "little") + b"{}"
        ),
    ),
    "run: code for a description": ("run", model({}, {"cxr_cache": "__import__('os').abort()"})),
    "run: YAML for a configuration": (
        "run",
        text("config.json", "!!python/object/apply:os.mkdir ['{marker}']"),
    ),
}
HARMLESS: dict[str, tuple[str, Make]] = {
    "npz: members outside the archive": ("npz", members_outside),
    "encoder: sound checkpoint": ("encoder", checkpoint(lambda _: {})),
    "encoder: wants weights from the hub": ("encoder", configured(timm_model_pretrained=True)),
    "run: tensor named like a path": ("run", model({"../../x": torch.ones(1)}, {})),
    "run: formulas in a table": (
        "run",
        text("predictions.csv", "image_id,Edema\n=HYPERLINK(1),1\n"),
    ),
}
CONTROLS: dict[str, Callable[[Path], None]] = {
    "unpickle": unpickle,
    "start a program": start_a_program,
    "open the bait natively": open_bait_natively,
    "write outside": write_outside,
}
CASES = SOUND | REFUSED | HARMLESS


# --- the child that is watched ----------------------------------------------------------------


class Bait:
    """A file of which the kernel reports every opening, by whatever library."""

    IN_OPEN = 0x20

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self._fd, os.fsencode(path), self.IN_OPEN) >= 0

    def was_opened(self) -> bool:
        """Since the last call."""
        try:
            return bool(os.read(self._fd, 65_536))
        except BlockingIOError:
            return False


class Watch:
    """Keeps what the audit hook is told while a case runs."""

    FAMILIES = ("os", "subprocess", "socket", "shutil", "pickle", "ctypes", "urllib", "http", "pty")
    QUIET = ("os.listdir", "os.scandir", "os.walk", "os.putenv", "os.fwalk")

    def __init__(self) -> None:
        self._events: list[tuple[str, list[str]]] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._events is None or event in self.QUIET:
            return
        family = event.partition(".")[0]
        if event in ("open", "exec") or family in self.FAMILIES:
            told = [os.fsdecode(a) if isinstance(a, bytes) else str(a) for a in arguments[:3]]
            self._events.append((event, told))

    @contextmanager
    def listen(self) -> Iterator[list[tuple[str, list[str]]]]:
        self._events = events = []
        try:
            yield events
        finally:
            self._events = None


def watch_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Read every case; what happened, by case."""
    bait = Bait(folder / "bait")
    for case, (kind, _) in (SOUND | HARMLESS).items():
        READERS[kind](folder / case)  # imports all that reading needs
    bait.was_opened()
    watch = Watch()
    found = {}
    readers = {case: READERS[kind] for case, (kind, _) in CASES.items()} | CONTROLS
    for case, read in readers.items():
        with watch.listen() as events:
            error = try_to(read, folder / case)
        found[case] = {
            "error": error,
            "events": list(events),
            "bait": bait.was_opened(),
            "marker": (folder / "marker").exists(),
        }
    return found


def try_to(read: Callable[[Path], None], folder: Path) -> str | None:
    try:
        read(folder)
    except CxrCacheError as error:
        return f"refused: {error}"
    except Exception as error:
        return repr(error)
    return None


# --- what it heard ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder per case, made here, to be read in the child."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("audit")
    (folder / "bait").write_bytes(b"not to be read" * 100)
    sound = {kind: folder / f"sound {kind}" for kind in READERS}
    for path in sound.values():
        path.mkdir()
    canary = np.ones((8, 8), np.float32)
    small_stores.make_store(sound["store"] / "s.h5", 20, canary=canary).close()
    ids = small_stores.make_cohort(2).image_ids
    np.savez(sound["npz"] / "e.npz", image_id=ids, embeddings=np.ones((2, 4), np.float32))
    write_open_clip_model(sound["encoder"], TIMM_VIT)
    run = Run.create(sound["run"], {})
    run.save_model(SavedModel({"weight": torch.ones(2)}, ("Edema",), {"Edema": 0.5}, {}, {}))
    run.write_table("predictions", pd.DataFrame({"image_id": ["a.png"], "Edema": [0.5]}))
    run.finish()

    payload = Payload(folder / "marker")
    for case, (kind, make) in (REFUSED | HARMLESS).items():
        shutil.copytree(sound[kind], folder / case)
        make(folder / case, payload, folder / "bait")
    (folder / "unpickle").mkdir()
    (folder / "unpickle" / "x.pkl").write_bytes(pickle.dumps(payload))
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict[str, dict[str, Any]]:
    subprocess.run(
        [sys.executable, "-m", "tests.evaluation.test_audit", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    return json.loads((folder / "found.json").read_text())


def suspicious(events: list[tuple[str, list[str]]], own: Path) -> list[str]:
    """The events that reading files in `own`, and writing a store there, cannot explain."""
    return [f"{event}{told}" for event, told in events if not is_explained(event, told, own)]


def is_explained(event: str, told: list[str], own: Path) -> bool:
    if event == "open":
        path, _, flags = told
        writes = int(flags) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return is_in(path, own) or (not writes and any(is_in(path, place) for place in LIBRARIES))
    if event in ("os.mkdir", "os.remove", "os.rename", "os.truncate"):
        paths = [text for text in told if not text.lstrip("-").isdecimal()]  # else descriptors
        return all(is_in(path, own) for path in paths)
    # A writer's lock names its host; torch looks for a GPU
    return event == "socket.gethostname" or (event, told) == ("ctypes.dlopen", [GPU_LIBRARY])


def is_in(path: str, place: str | Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(place))


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_executed_started_or_opened_outside(folder, found, case):
    seen = found[case]
    assert not suspicious(seen["events"], folder / case)
    assert not seen["bait"]
    assert not seen["marker"]


@pytest.mark.parametrize("case", REFUSED)
def test_what_wants_to_do_something_is_refused_in_a_message(found, case):
    assert str(found[case]["error"]).startswith("refused: "), found[case]["error"]


@pytest.mark.parametrize(
    ("control", "heard"),
    [
        ("unpickle", "pickle.find_class['posix', 'mkdir']"),
        ("start a program", "os.system['true']"),
        ("write outside", "written', 'w',"),
    ],
)
def test_the_watch_hears_what_the_package_never_does(folder, found, control, heard):
    assert any(heard in event for event in suspicious(found[control]["events"], folder / control))


def test_the_watch_sees_an_executed_payload_and_a_library_at_the_bait(found):
    assert found["unpickle"]["marker"]
    assert found["open the bait natively"]["bait"]
    assert not found["open the bait natively"]["events"]  # Python knows nothing about it


@pytest.mark.parametrize("case", [*SOUND, *HARMLESS])
def test_the_others_are_read(found, case):
    assert found[case]["error"] is None


if __name__ == "__main__":
    Path(sys.argv[1], "found.json").write_text(json.dumps(watch_all(Path(sys.argv[1]))))
