"""Files from strangers: refused in under a second, within 64 MB, without doing what they ask."""

from __future__ import annotations

import os
import pickle
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from cxr_cache.errors import CxrCacheError, StoreFormatError, TableError
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.importing import import_embeddings
from cxr_cache.store.layout import read_layout
from tests.faults.oracle import run_in_child
from tests.small_stores import make_cohort, make_store

GROWTH = 64 << 20


def replace(file: h5py.File, name: str, **options) -> None:
    values = file[name][:]
    del file[name]
    file.create_dataset(name, data=values, **options)


def external_storage(file: h5py.File, name: str = "embeddings") -> None:
    shape = file[name].shape
    del file[name]
    secret = Path(file.filename).with_name("secret")
    file.create_dataset(name, shape, "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


def virtual(file: h5py.File) -> None:
    shape = file["embeddings"].shape
    del file["embeddings"]
    layout = h5py.VirtualLayout(shape, "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "embeddings", shape)
    file.create_virtual_dataset("embeddings", layout)


def huge_claim(file: h5py.File) -> None:
    for name in list(file):
        if len(file[name].shape) and name not in ("canary", "fixed_digest"):
            dtype, shape = file[name].dtype, file[name].shape
            del file[name]
            file.create_dataset(name, (1 << 50, *shape[1:]), dtype, chunks=None)


def wide_rows(file: h5py.File) -> None:
    del file["embeddings"]
    file.create_dataset("embeddings", (20, 1 << 30, 1 << 20), "f4", chunks=None)


def link(kind) -> Callable[[h5py.File], None]:
    def act(file: h5py.File) -> None:
        del file["embeddings"]
        file["embeddings"] = kind

    return act


def attribute(key: str, value) -> Callable[[h5py.File], None]:
    def act(file: h5py.File) -> None:
        file.attrs[key] = value

    return act


def retyped(name: str, values) -> Callable[[h5py.File], None]:
    def act(file: h5py.File) -> None:
        if name in file:
            del file[name]
        file[name] = values

    return act


def many_links(file: h5py.File) -> None:
    for i in range(20_000):
        file[f"x{i}"] = h5py.SoftLink("/nowhere")


def group_instead(file: h5py.File) -> None:
    del file["pooled"]
    file.create_group("pooled")


def references(file: h5py.File) -> None:
    del file["status"]
    file.create_dataset("status", (20,), h5py.ref_dtype)


def loop(file: h5py.File) -> None:
    del file["pooled"]
    file["pooled"] = file["/"]


def variable_text(file: h5py.File) -> None:
    ids = [text.decode() for text in file["image_id"][:]]
    del file["image_id"]
    file.create_dataset("image_id", data=ids, dtype=h5py.string_dtype())


HOSTILE: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "soft link": (link(h5py.SoftLink("/pooled")), "'embeddings' is a link"),
    "dangling link": (link(h5py.SoftLink("/nowhere")), "'embeddings' is a link"),
    "external link": (link(h5py.ExternalLink("/etc/passwd", "/x")), "'embeddings' is a link"),
    "external storage": (external_storage, "not plain contiguous"),
    "virtual dataset": (virtual, "not plain contiguous"),
    "chunks": (lambda file: replace(file, "embeddings", chunks=True), "not plain contiguous"),
    "filter": (lambda file: replace(file, "embeddings", compression="gzip"), "not plain"),
    "variable text": (variable_text, "not plain contiguous"),
    "references": (references, "not plain contiguous"),
    "compound": (retyped("status", np.zeros(20, [("a", "u1")])), "not plain contiguous"),
    "huge claim": (huge_claim, "no rows, or no place"),
    "wide rows": (wide_rows, "no rows, or no place"),
    "other endianness": (retyped("targets", np.zeros((20, 3), ">f4")), "expected <f4"),
    "other width": (retyped("image_sha256", np.zeros((20, 31), "u1")), "expected u1 and 20 x 32"),
    "other views": (
        retyped("tokens", np.zeros((20, 2, 5, 6), "<f2")),
        "expected <f2 and 20 x 1 x any x any",
    ),
    "other length": (retyped("status", np.zeros(19, "u1")), "expected u1 and 20"),
    "no rows": (retyped("image_id", np.zeros(0, "S4")), "no rows"),
    "scalar": (retyped("status", np.uint8(1)), "no rows"),
    "many canaries": (retyped("canary", np.zeros((1000, 8), "f4")), "'canary' has type"),
    "group": (group_instead, "'pooled' is a group"),
    "loop": (loop, "'pooled' is a group"),
    "unknown dataset": (retyped("x", np.zeros(3)), "which a store does not have"),
    "many links": (many_links, "which a store does not have"),
    "missing dataset": (lambda file: file.__delitem__("row_digest"), "lacks"),
    "variable attribute": (attribute("encoder", "{}"), "not a text"),
    "array attribute": (attribute("encoder", np.zeros(5000)), "not a text"),
    "empty attribute": (attribute("encoder", h5py.Empty("S3")), "not a text|cannot be read"),
    "no JSON": (attribute("encoder", np.bytes_(b"{{{")), "cannot be read"),
    "deep JSON": (attribute("encoder", np.bytes_(b"[" * 60_000)), "cannot be read"),
    "other JSON": (attribute("findings", np.bytes_(b"[1, 2]")), "description"),
    "newer format": (
        attribute("format_version", np.bytes_(b"4")),
        "4 in the store, 1 or 2 or 3 in",
    ),
    "odd format": (attribute("format_version", np.bytes_(b'["a"]')), "format_version"),
    "changed encoder": (attribute("encoder", np.bytes_(b'{"name": "another"}')), "damaged"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "s.h5"
    make_store(path, 20, canary=np.ones((8, 8), np.float32)).close()
    return path.read_bytes()


def refuse_in_child(path: Path, message: str) -> None:
    """Open a file with little memory and time, in a process that is watched."""

    def work(_) -> None:
        opened = []
        sys.addaudithook(
            lambda event, arguments: opened.append(arguments[0]) if event == "open" else None
        )
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + GROWTH, used + GROWTH))
        started = time.process_time()
        with pytest.raises(StoreFormatError, match=message) as caught:
            FeatureStore.open(path)
        assert time.process_time() - started < 1
        assert str(path) in str(caught.value)
        others = {str(file) for file in opened} - {str(path), "/proc/self/statm"}
        assert not others, f"opened {others}"

    assert run_in_child(work)[1] == 0


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_structures_are_refused(tmp_path, sound, kind):
    act, message = HOSTILE[kind]
    path = tmp_path / "s.h5"
    path.write_bytes(sound)
    (tmp_path / "secret").write_bytes(b"not to be read" * 100)
    with h5py.File(path, "r+") as file:
        act(file)
    refuse_in_child(path, message)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89HDF\r\n\x1a\n",
        b"\x89HDF\r\n\x1a\n\0" + b"\xff" * 4096,
        b"\x89HDF\r\n\x1a\n\0" + b"\0" * 4096,
        b"\0" * 512 + b"\x89HDF\r\n\x1a\n\0" + b"\0" * 4096,
        pickle.dumps([1]),
        os.urandom(0) + b"PK\x03\x04" + b"\0" * 100,
    ],
)
def test_other_contents_are_refused(tmp_path, content):
    path = tmp_path / "s.h5"
    path.write_bytes(content)
    refuse_in_child(path, "feature store")


def test_newer_hdf5_layouts_are_refused(tmp_path):
    """Files for concurrent reading may need repair after a crash; a store never is one."""
    path = tmp_path / "s.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs["format_version"] = np.bytes_(b"1")
    refuse_in_child(path, "not a feature store")


def test_overlapping_and_sparse_datasets_are_refused(tmp_path, sound):
    """Built by hand: libhdf5 would not write them."""
    path = tmp_path / "s.h5"
    path.write_bytes(sound)
    with path.open("rb") as file:
        columns = read_layout(file.fileno(), path).columns
    patched = bytearray(sound)
    old, new = columns["pooled"].offset, columns["embeddings"].offset
    at = sound.find(old.to_bytes(8, "little") + columns["pooled"].n_bytes.to_bytes(8, "little"))
    assert at > 0
    patched[at : at + 8] = new.to_bytes(8, "little")
    path.write_bytes(patched)
    refuse_in_child(path, "overlaps")


def test_a_pipe_and_a_folder_are_no_stores(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(CxrCacheError, match="no feature store"):
            FeatureStore.open(path)


# -- nothing is executed ----------------------------------------------------------------


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_an_npz_is_not_executed(tmp_path):
    marker = tmp_path / "executed"
    ids = np.array([Payload(marker), "a"], dtype=object)
    np.savez(tmp_path / "e.npz", image_id=ids, embeddings=np.ones((2, 4), np.float32))
    with pytest.raises(TableError, match=r"e\.npz"):
        import_embeddings(tmp_path / "e.npz", make_cohort(2), tmp_path / "s.h5")
    values = np.array([[Payload(marker)]], dtype=object)
    np.savez(tmp_path / "f.npz", image_id=np.array(["a"]), embeddings=values)
    with pytest.raises(TableError, match=r"f\.npz"):
        import_embeddings(tmp_path / "f.npz", make_cohort(2), tmp_path / "s.h5")
    assert not marker.exists()


def test_a_pickle_in_encoder_weights_is_not_executed(tmp_path):
    import torch

    from cxr_cache.encoders.weights import load_weights
    from cxr_cache.errors import EncoderError

    marker = tmp_path / "executed"
    for name in ("open_clip_pytorch_model.bin", "model.pth"):
        torch.save({"visual.proj": torch.ones(2), "x": Payload(marker)}, tmp_path / name)
        with pytest.raises(EncoderError, match="was refused"):
            load_weights(torch.nn.Linear(1, 1), tmp_path / name)
        (tmp_path / name).write_bytes(pickle.dumps(Payload(marker)))
        with pytest.raises(EncoderError):
            load_weights(torch.nn.Linear(1, 1), tmp_path / name)
    assert not marker.exists()


def test_nothing_in_the_package_unpickles():
    """By reading it: every torch.load says weights_only, and of pickle only its errors are used."""
    package = Path(__file__).parents[2] / "cxr_cache"
    for file in package.glob("*.py"):
        text = file.read_text()
        for call in ("pickle.load", "Unpickler(", "allow_pickle=True", "eval(", "exec("):
            found = [line for line in text.splitlines() if call in line]
            found = [line for line in found if not re.search(r"[.\w]eval\(", line)]  # model.eval()
            assert not found, f"{file.name}: {found}"
        assert text.count("torch.load(") == text.count("weights_only=True"), file.name
