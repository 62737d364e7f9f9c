"""How much memory there is, under the limits that batch systems and containers set."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr_cache.common.devices import free_ram_bytes

GIB = 2**30
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
V2 = ("memory.max", "memory.current", "file")
NO_LIMIT_V1 = 9223372036854771712


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def machine(root: Path, cgroup: str | None, available: int = 100 * GIB) -> Path:
    write(root / "proc/meminfo", f"MemTotal: 9 kB\nMemAvailable: {available // 1024} kB")
    if cgroup is not None:
        write(root / "proc/self/cgroup", cgroup)
    return root


def limit(folder: Path, files: tuple[str, str, str], most: object, used: int, cached: int) -> None:
    for name, value in zip(files[:2], (most, used), strict=True):
        write(folder / name, value)
    write(folder / "memory.stat", f"anon 5\n{files[2]} {cached}")


SLURM = "system.slice/slurmstepd.scope/job_7"


@pytest.mark.parametrize(
    ("cgroup", "group", "files"),
    [
        (f"0::/{SLURM}/step_0/user/task_0", f"sys/fs/cgroup/{SLURM}", V2),
        (f"0::/{SLURM}/step_0", f"sys/fs/cgroup/{SLURM}/step_0", V2),
        ("0::/", "sys/fs/cgroup", V2),
        (None, "sys/fs/cgroup", V2),
        ("0::/../../init.scope", "sys/fs/cgroup", V2),
        ("4:cpu,memory:/slurm/job_7/step_0\n0::/x", "sys/fs/cgroup/memory/slurm/job_7", V1),
        ("9:memory:/docker/0a1b", "sys/fs/cgroup/memory", V1),  # a container sees its own as root
        ("1:name=systemd:/x\n0::/a", "sys/fs/cgroup/unified/a", V2),
    ],
)
def test_limits_of_the_job_and_of_what_it_lies_in_are_heeded(tmp_path, cgroup, group, files):
    root = machine(tmp_path, cgroup)
    assert free_ram_bytes(root) == 100 * GIB
    limit(root / group, files, 8 * GIB, 5 * GIB, 2 * GIB)
    assert free_ram_bytes(root) == 5 * GIB


def test_the_tightest_of_several_limits_counts(tmp_path):
    root = machine(tmp_path, "0::/a/b/c")
    limit(root / "sys/fs/cgroup/a", V2, 8 * GIB, GIB, 0)
    limit(root / "sys/fs/cgroup/a/b", V2, 2 * GIB, GIB, 0)
    limit(root / "sys/fs/cgroup/a/b/c", V2, "max", GIB, 0)
    limit(root / "sys/fs/cgroup/z", V2, 5, 0, 0)  # of another job
    assert free_ram_bytes(root) == GIB


def test_no_limit_is_no_limit(tmp_path):
    root = machine(tmp_path, "4:memory:/a\n0::/a")
    limit(root / "sys/fs/cgroup/memory/a", V1, NO_LIMIT_V1, GIB, 0)
    limit(root / "sys/fs/cgroup/a", V2, "max", GIB, 0)
    assert free_ram_bytes(root) == 100 * GIB


def test_memory_beyond_the_limit_is_none_left(tmp_path):
    root = machine(tmp_path, "0::/a")
    limit(root / "sys/fs/cgroup/a", V2, GIB, 2 * GIB, 0)
    assert free_ram_bytes(root) == 0


def test_a_machine_that_says_nothing_has_some(tmp_path, monkeypatch):
    assert free_ram_bytes(tmp_path) > 2**26
    monkeypatch.delattr("os.sysconf")
    assert free_ram_bytes(tmp_path) == GIB
