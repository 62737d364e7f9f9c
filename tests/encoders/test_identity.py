"""Two encoders' features may be mixed, or every reason why not is named with both values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cxr_cache.encoders.identity import compare_encoders, require_not_imported, require_same_encoder
from cxr_cache.errors import EncoderError, RunError, StoreMismatchError

IMPORTED = {"name": "imported:a.npz", "imported": True, "weights_sha256": "a", "embedding_width": 8}
PLACES = ("in the store", "now", "Use the store's.")


def test_equal_weights_under_another_name_are_the_same_encoder(encoder):
    recorded = encoder.identity.to_dict()
    renamed = recorded | {"name": "local-dir:/elsewhere", "revision": "abc"}
    assert compare_encoders(recorded, renamed) == {}
    require_same_encoder(recorded, renamed, *PLACES, problem="other weights")


def test_what_differs_is_named_with_both_values_and_the_remedy(encoder):
    recorded = encoder.identity.to_dict()
    other = recorded | {"precision": "bf16"}
    with pytest.raises(StoreMismatchError) as caught:
        require_same_encoder(recorded, other, *PLACES, problem="s.h5 is another's")
    assert str(caught.value) == (
        "s.h5 is another's:\n  precision: 'fp32' in the store, 'bf16' now\nUse the store's."
    )
    with pytest.raises(RunError):
        require_same_encoder(recorded, other, *PLACES, problem="", error=RunError)


def test_where_weights_differ_names_and_revisions_are_shown(encoder):
    recorded = encoder.identity.to_dict() | {"revision": "abc"}
    other = recorded | {"weights_sha256": "0", "revision": "def"}
    assert compare_encoders(recorded, other) == {
        "revision": ("abc", "def"),
        "weights_sha256": (recorded["weights_sha256"], "0"),
    }


def test_a_line_says_which_weights_these_are(encoder):
    pinned = replace(encoder.identity, name="hf-hub:a/b@abc", revision="abc", weights_sha256="0f")
    assert pinned.to_text() == "hf-hub:a/b@abc, weights sha256 0f"
    found = replace(pinned, name="hf-hub:a/b")
    assert found.to_text() == "hf-hub:a/b at revision abc, weights sha256 0f"


def test_of_imported_embeddings_only_the_width_is_compared(encoder):
    again = IMPORTED | {"name": "imported:b.npz", "weights_sha256": "b"}
    assert compare_encoders(IMPORTED, again) == {}
    assert compare_encoders(IMPORTED, again | {"embedding_width": 9}) == {"embedding_width": (8, 9)}
    assert compare_encoders(IMPORTED, encoder.identity.to_dict())["imported"] == (True, None)


def test_nothing_more_is_computed_of_imported_embeddings(encoder):
    require_not_imported(encoder.identity.to_dict(), "s.h5 holds", "no.")
    with pytest.raises(StoreMismatchError, match=r"^s\.h5 holds embeddings imported.*npz; no"):
        require_not_imported(IMPORTED, "s.h5 holds", "no encoder.")


def test_what_is_no_identity_is_refused(encoder):
    with pytest.raises(EncoderError, match="holds the fields"):
        compare_encoders({"name": "x"}, encoder.identity.to_dict())
