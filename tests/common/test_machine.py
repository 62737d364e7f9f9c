"""A result says what its last digits depend on."""

from __future__ import annotations

import json

import joblib
import numpy as np
import torch

from cxr_cache.common.machine import compare_machines, describe_machine, name_processor

X86 = """processor : 0
vendor_id : GenuineIntel
cpu family : 6
model      : 85
model name : Intel(R) Xeon(R) Gold 6226R CPU @ 2.90GHz
processor : 1
model name : another
"""


def test_the_machine_is_described_as_torch_and_numpy_see_it(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("HOME_OF_NOTHING", "1")

    machine = describe_machine(torch.device("cpu"))

    assert machine == json.loads(json.dumps(machine))
    built_with = torch.__config__.show()
    assert f"CPU capability usage: {machine['instructions']}" in built_with
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cores"] == joblib.cpu_count()
    libraries = [library.split() for library in machine["torch_libraries"].split(", ")]
    assert all(version in built_with for _, version in libraries)
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    assert machine["numpy_blas"].split()[0] in blas
    assert machine["environment"]["MKL_CBWR"] == "COMPATIBLE"
    assert "HOME_OF_NOTHING" not in machine["environment"]
    assert "gpu" not in machine


def test_a_processor_is_named_with_its_numbers(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(X86)
    named = "Intel(R) Xeon(R) Gold 6226R CPU @ 2.90GHz (family 6, model 85)"
    assert name_processor(cpuinfo) == named
    cpuinfo.write_text("processor : 0\nBogoMIPS : 50.00\n")  # of ARM
    assert name_processor(cpuinfo)
    assert name_processor(tmp_path / "missing")


def test_equal_machines_differ_in_nothing():
    machine = describe_machine(torch.device("cpu"))
    assert compare_machines(machine, dict(machine)) == ""
    assert compare_machines(machine, machine | {"threads": 99}) == (
        f"threads {machine['threads']} and 99"
    )
