"""Words of messages: names that hold commas stay apart."""

from __future__ import annotations

from cxr_cache.common.wording import list_names


def test_names_with_commas_do_not_run_together():
    """CheXpert's and PadChest's findings have commas in their names."""
    assert list_names(["Edema", "Mass"]) == "Edema, Mass"
    assert list_names(["Edema", "Nodule, calcified", "Mass"]) == "Edema; Nodule, calcified; Mass"
    assert list_names(["Edema", "Nodule, calcified"], 1) == "Edema and 1 more"
    assert list_names(["a"] * 2000, 1) == "a and 1,999 more"
    assert list_names([], 3) == ""
