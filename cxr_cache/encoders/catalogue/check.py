"""The table of known encoders, and the check of one: what it is, what it costs, what to mind."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final

from cxr_cache.common.tables import hash_file
from cxr_cache.common.wording import list_names
from cxr_cache.encoders.catalogue.known import Known, find_known, read_known

_WIDTH: Final = 79
"""Columns of the texts, which fit a narrow terminal and a page."""
_HEAD: Final = """\
name               px  width  MB/image  licence
    what it was trained on; what to mind
"""
_FOOT: Final = """
MB/image: tokens of an image in float16, as extract --tokens keeps them.
Type a name after --model; other encoders are named hf-hub:ORG/REPO,
local-dir:FOLDER, local-file:WEIGHTS, timm:NAME or as open_clip does. Those
without MB/image cannot be loaded here; their features come in by cxr-cache
import. cxr-cache encoders NAME tells more of one, and checks it."""


def format_known() -> str:
    """Write the table of known encoders for a terminal, in 79 columns."""
    return f"{_HEAD}\n" + "\n".join(map(_format_row, read_known().values())) + f"\n{_FOOT}"


def _format_row(known: Known) -> str:
    size = f"{known.token_mb:.2f}" if known.n_tokens else "-"
    licence = known.licence + ", gated" * known.is_gated
    row = f"{known.name:<16} {known.image_px:>4} {known.width:>6} {size:>9}  {licence}"
    about = f"{known.trained_on[:1].upper()}{known.trained_on[1:]}. {known.note}"
    return f"{row}\n{textwrap.indent(textwrap.fill(about, _WIDTH - 4), '    ')}"


def format_one(known: Known) -> str:
    """Write what is known of an encoder for a terminal, in 79 columns."""
    return "\n".join(_format_facts(_list_known(describe_known(known))))


def describe_known(known: Known) -> dict[str, Any]:
    """Give what is known of an encoder, JSON-able."""
    return asdict(known) | {"token_mb": round(known.token_mb, 3)}


def check_encoder(name: str, **options: Any) -> dict[str, Any]:
    """Load an encoder, encode one black image, and describe it, JSON-able.

    Parameters
    ----------
    name, options
        As :func:`cxr_cache.encoders.loading.load_encoder` takes them.

    Raises
    ------
    EncoderError
        The encoder cannot be loaded; as :func:`cxr_cache.encoders.loading.load_encoder` says it.
    """
    from cxr_cache.encoders.loading import FAMILIES, find_encoder, load_encoder  # imports torch

    family, source = find_encoder(name)
    cfg, encoder = source.model_cfg, load_encoder(name, **options)
    identity, known = encoder.identity, find_known(name)
    n_tokens, width = identity.n_tokens, identity.token_width
    file_sha256 = None if source.weights is None else hash_file(source.weights)
    pinned = {each.file_sha256: each.name for each in read_known().values() if each.file_sha256}
    return identity.to_dict() | {
        "family": next(key for key, other in FAMILIES.items() if other is family),
        "architecture": cfg.get("model_type") or cfg.get("architecture"),
        "tower": type(getattr(encoder.visual, "trunk", encoder.visual)).__name__,
        "n_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "token_mb": n_tokens * width * 2 / 1e6 if n_tokens and width else None,
        "weights_file": None if source.weights is None else str(source.weights),
        "file_sha256": file_sha256,
        "is_pinned_file_of": pinned.get(file_sha256 or ""),
        "known": None if known is None else describe_known(known),
    }


def format_check(found: dict[str, Any]) -> str:
    """Text of :func:`check_encoder` for a terminal, in 79 columns."""
    return "\n".join([found["name"], *_format_facts(_list_facts(found))])


def _format_facts(facts: Iterable[tuple[str, str]]) -> list[str]:
    """One paragraph per fact; a word that is longer than a line, such as a digest, stays whole."""
    return [
        textwrap.fill(
            fact,
            _WIDTH,
            initial_indent=f"  {label:<15} ",
            subsequent_indent=" " * 18,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for label, fact in facts
        if fact
    ]


def _list_facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What the check found, by labels; an empty text stands for nothing to say."""
    n_blocks, from_px = found["n_blocks"], found.get("positions_from_px")
    pixels = found["preprocessing"]
    tower = f"{found['tower']}, {found['n_parameters'] / 1e6:,.1f} M parameters"
    tokens = "none: this tower is not taken apart, so only its embedding can be cached"
    tuning = "not from tokens: its tower is no plain vision transformer; train heads on it"
    if n_blocks is not None:
        tower += f", {n_blocks} blocks"
        tokens = (
            f"{found['n_tokens']:,} of width {found['token_width']:,} per image, "
            f"{found['token_mb']:.2f} MB in float16"
        )
        tuning = f"from tokens, up to {n_blocks} blocks (finetune --unfreeze-layers)"
    embedding = f"{found['embedding_width']:,} numbers"
    if found["pooled_width"] != found["embedding_width"]:
        embedding += f", projected from {found['pooled_width']:,}"
    return [
        ("family", f"{found['family']} {found['architecture'] or ''}"),
        ("tower", tower),
        ("tokens", tokens),
        ("embedding", embedding),
        ("pool", found.get("pool", "default")),
        ("images", _say_resizing(pixels)),
        ("mean", _say_three(pixels["mean"])),
        ("std", _say_three(pixels["std"])),
        ("positions", f"resampled from those of {from_px} px" if from_px else ""),
        ("fine-tuning", tuning),
        ("revision", found["revision"] or ""),
        ("weights file", found["weights_file"] or "none: RANDOM WEIGHTS without medical meaning"),
        ("its sha256", f"{found['file_sha256'] or ''} {_say_pinned(found)}".strip()),
        ("weights sha256", f"{found['weights_sha256']} (image tower as loaded)"),
        *(("note", note) for note in found.get("notes", ())),
    ]


def _say_pinned(found: dict[str, Any]) -> str:
    """Say whether this is the file of a known encoder, where that is pinned."""
    known = found["known"] or {}
    if found["is_pinned_file_of"]:
        return f"(the file that {found['is_pinned_file_of']} stands for)"
    return f"(NOT the file that {known['name']} stands for)" if known.get("file_sha256") else ""


def _list_known(known: dict[str, Any]) -> list[tuple[str, str]]:
    seen = "not known here; its page may say"
    if known["seen"]:
        seen = f"{list_names(known['seen'])}: a test on these is not clean"
    if known["seen"] == ("none",):
        seen = "no data set of chest X-rays"
    return [
        ("short name", known["name"]),
        ("stands for", known["model"]),
        ("trained on", known["trained_on"]),
        ("has seen", seen),
        ("licence", known["licence"] + "; gated" * known["is_gated"]),
        ("page", known["page"]),
        ("mind", known["note"]),
    ]


def _say_resizing(preprocessing: dict[str, Any]) -> str:
    """Say how an image becomes a square."""
    px = preprocessing["image_size_px"]
    first = preprocessing.get("resize_px") or px
    how = {
        "crop": f"shorter edge to {first} px, centre of {px} x {px} cut out",
        "squash": f"squeezed to {first} x {first} px"
        + f", centre of {px} x {px} cut out" * (first != px),
        "pad": f"longer edge to {first} px, black margins to {px} x {px}",
    }
    return f"{how[preprocessing['resize']]}, {preprocessing['interpolation']}"


def _say_three(values: list[float]) -> str:
    """One number where three are equal."""
    return " ".join(f"{value:g}" for value in (values if len(set(values)) > 1 else values[:1]))
