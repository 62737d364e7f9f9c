"""What decides whether two sets of features may be mixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cxr_cache.errors import EncoderError


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

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderIdentity:
        """The inverse of :meth:`to_dict`.

        Raises
        ------
        EncoderError
            A field is missing or unknown.
        """
        expected = {field.name for field in fields(cls)}
        if set(values) != expected:
            raise EncoderError(
                f"An encoder's identity holds the fields {sorted(expected)}, not {sorted(values)}."
            )
        return cls(**values)

    def differences(self, other: EncoderIdentity) -> dict[str, tuple[Any, Any]]:
        """What makes features of the two incomparable: field -> (mine, theirs).

        Equal weights under two names are the same encoder, so names count only where the
        weights differ. An empty answer means that the features may be mixed.
        """
        mine, theirs = self._comparable(), other._comparable()
        if self.weights_sha256 == other.weights_sha256:
            mine["name"] = theirs["name"] = None
        return {
            field: (mine.get(field), theirs.get(field))
            for field in mine | theirs
            if mine.get(field) != theirs.get(field)
        }

    def _comparable(self) -> dict[str, Any]:
        """The fields that matter, with the preprocessing's among them."""
        own = {
            name: value
            for name, value in self.to_dict().items()
            if name not in ("revision", "preprocessing", "is_random")
        }
        return own | dict(self.preprocessing)
