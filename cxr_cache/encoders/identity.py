"""What decides whether two sets of features may be mixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from cxr_cache.common.wording import describe_differences, find_differences
from cxr_cache.datasets.preprocessing import number_decode_rule
from cxr_cache.errors import CxrCacheError, EncoderError, StoreMismatchError

_LATER_FIELDS: Final = {"pool": "default", "positions_from_px": None, "notes": ()}
"""Fields that version 0.1.0 did not have, with what they were then."""


@dataclass(frozen=True)
class EncoderIdentity:
    """What decides whether two sets of features may be mixed, as a store records it.

    Widths and counts are those of one real forward pass; None where there is no such thing:
    blocks and tokens of a tower that cannot be split, the pooled output of imported embeddings.
    """

    name: str
    revision: str | None
    """Commit of the repository; None where there is none (a folder, random weights)."""
    weights_sha256: str
    """Of the vision tensors as loaded: names, types, shapes and bytes, whatever file held them."""
    preprocessing: Mapping[str, Any]
    """What :meth:`Preprocessing.to_dict` gives: size, statistics, resizing and decode rule."""
    precision: str
    n_blocks: int | None
    n_tokens: int | None
    token_width: int | None
    pooled_width: int | None
    embedding_width: int
    is_random: bool
    """The weights are seeded noise: for demonstrations, tests and speed, not for findings."""
    pool: str = "default"
    """How tokens became the embedding, if not as the encoder does by itself."""
    positions_from_px: int | None = None
    """Size of the images that position embeddings were trained on, where they were resampled."""
    notes: tuple[str, ...] = ()
    """What to know of features of this encoder, in sentences: on the page and the model card."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able, without those of later versions that say nothing."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in _LATER_FIELDS or value != _LATER_FIELDS[name]
        }

    def to_text(self) -> str:
        """Name, revision and digest of the weights, for a line of a terminal or a paper."""
        is_said = self.revision is None or self.name.endswith(f"@{self.revision}")
        where = "" if is_said else f" at revision {self.revision}"
        return f"{self.name}{where}, weights sha256 {self.weights_sha256}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderIdentity:
        """The inverse of :meth:`to_dict`.

        Raises
        ------
        EncoderError
            A field is missing or unknown.
        """
        expected = {field.name for field in fields(cls)}
        if set(values) | set(_LATER_FIELDS) != expected:
            raise EncoderError(
                f"An encoder's identity holds the fields {sorted(expected)}, not {sorted(values)}."
            )
        notes = tuple(values.get("notes", ()))
        return cls(**(number_decode_rule(values) | {"notes": notes}))

    def differences(self, other: EncoderIdentity) -> dict[str, tuple[Any, Any]]:
        """What makes features of the two incomparable: field -> (mine, theirs).

        Equal weights under two names are the same encoder, so names and revisions count only where
        the weights differ. An empty answer means that the features may be mixed.
        """
        mine, theirs = self._comparable(), other._comparable()
        if self.weights_sha256 == other.weights_sha256:
            for name in ("name", "revision"):
                mine[name] = theirs[name] = None
        return find_differences(mine, theirs)

    def _comparable(self) -> dict[str, Any]:
        """The fields that matter, with the preprocessing's among them."""
        fields = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("preprocessing", "is_random", "notes")
        }
        return fields | dict(self.preprocessing)


def compare_encoders(
    recorded: Mapping[str, Any], here: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """What keeps features of two encoders apart: field -> (recorded, here); empty if nothing does.

    A second import of embeddings has another digest even if the same network made them, so of
    those only the widths can be compared. Given is what stores and runs record of their encoder:
    :meth:`EncoderIdentity.to_dict`, or where embeddings were imported, from what.
    """
    if recorded.get("imported") or here.get("imported"):
        keys = ("imported", "embedding_width")
        return find_differences(*({key: one.get(key) for key in keys} for one in (recorded, here)))
    return EncoderIdentity.from_dict(recorded).differences(EncoderIdentity.from_dict(here))


def require_same_encoder(
    recorded: Mapping[str, Any],
    here: Mapping[str, Any],
    where_recorded: str,
    where_here: str,
    remedy: str,
    *,
    problem: str,
    error: type[CxrCacheError] = StoreMismatchError,
) -> None:
    """Raise unless features of the two encoders may be mixed.

    Parameters
    ----------
    recorded, here
        As for :func:`compare_encoders`.
    where_recorded, where_here
        Where each was found: ``"in the store"``.
    problem, remedy
        First sentence of the message, without its full stop, and the last.
    error
        What is raised, with every differing field and both its values.
    """
    if differences := compare_encoders(recorded, here):
        listed = describe_differences(differences, where_recorded, where_here)
        raise error(f"{problem}:\n{listed}\n{remedy}")


def require_not_imported(
    recorded: Mapping[str, Any],
    owner: str,
    consequence: str,
    error: type[CxrCacheError] = StoreMismatchError,
) -> None:
    """Raise where embeddings were imported, so that there is no encoder to compute more of them.

    The message begins with `owner` ("s.h5 holds") and ends with the consequence.
    """
    if recorded.get("imported"):
        raise error(f"{owner} embeddings imported from {recorded['name']}; {consequence}")
