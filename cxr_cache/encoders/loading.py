"""An encoder's name -> the encoder: its source found, its tower built, filled and split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any, Final

from torch import nn

from cxr_cache.common.devices import require_choice, resolve_device, resolve_precision
from cxr_cache.config import DEFAULT_ENCODER, POOLS, EncoderOptions
from cxr_cache.encoders import bare_files, hugging_face, open_clip, timm_models
from cxr_cache.encoders.catalogue.known import find_known, spell_out
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.identity import EncoderIdentity
from cxr_cache.encoders.sources import (
    IMAGENET,
    Family,
    Source,
    join_query,
    keep_links,
    open_place,
    split_query,
)
from cxr_cache.encoders.timm_vit import find_random, pool_otherwise, split_pooled
from cxr_cache.encoders.weights import WithoutDrawing
from cxr_cache.errors import EncoderError

FAMILIES: Final[dict[str, Family]] = {
    "open_clip": open_clip.FAMILY,
    "hugging_face": hugging_face.FAMILY,
    "timm": timm_models.FAMILY,
    **bare_files.FAMILIES,
    "random": replace(open_clip.FAMILY, find={"random": find_random}),
}
"""Where names are looked up, in this order: the last family that knows a name's scheme says what
the encoder lacks. A file of weights is read as a configuration beside it says, before its own
tensors are asked."""


def find_encoder(name: str) -> tuple[Family, Source]:
    """Read what a name stands for: its family, its configuration, and where the weights are.

    Names are those of :func:`load_encoder`.

    Raises
    ------
    EncoderError
        No family knows the name, or what it leads to is not whole.
    """
    plain, query = split_query(spell_out(name))
    scheme, colon, identifier = plain.partition(":")
    if not colon:
        scheme, identifier = "", plain
    if not identifier:
        raise _no_encoder(name)
    if scheme == "local-dir" and keep_links(identifier).is_file():
        scheme = "local-file"
    place = None if scheme == "local-file" else open_place(scheme, identifier)
    if place is None and "file" in query:
        raise EncoderError(
            f"?file= in {name} names a file of a folder or repository: it goes with local-dir: and "
            "hf-hub: names."
        )
    bare = None if place is None else bare_files.find_in_place(place, query.get("file"))
    lookups = [(scheme, identifier)]
    if bare is not None:
        by_file = ("local-file", str(bare.path))
        lookups = [by_file] if "file" in query else [by_file, *lookups]
    known = find_known(name)
    # An encoder that no repository holds is told by its name, whatever lies beside the file
    families = bare_files.FAMILIES if known is not None and not known.model else FAMILIES
    for (scheme, identifier), family in product(lookups, families.values()):
        source = family.find[scheme](identifier) if scheme in family.find else None
        if source is None:
            continue
        if bare is not None and scheme == "local-file":  # its place has a name of its own
            source = replace(source, name=bare.name, revision=bare.revision)
        if known is not None and source.is_bare:
            source = bare_files.take_known(source, known)
        return family, _resize(source, query.get("img_size"))
    raise bare_files.describe_unknown(identifier) if scheme == "local-file" else _no_encoder(name)


def _no_encoder(name: str) -> EncoderError:
    return EncoderError(
        f"'{name}' names no encoder. Names are hf-hub:ORG/REPO, local-dir:PATH, local-file:PATH, "
        "timm:NAME, random:TIMM_NAME, or an open_clip architecture with its weights, "
        "ViT-B-32/laion2b_s34b_b79k."
    )


def _resize(source: Source, img_size: str | None) -> Source:
    """Ask for images of another size, which is then part of the name."""
    if img_size is None:
        return source
    plain, asked = split_query(source.name)
    sized = join_query(plain, asked | {"img_size": img_size})
    return replace(source, name=sized, img_size=int(img_size))


def load_encoder(
    name: str = DEFAULT_ENCODER,
    *,
    device: str = "cpu",
    precision: str = "auto",
    resize: str | None = None,
    normalize: str = "encoder",
    bits_stored: int | None = None,
    antialias: bool = True,
    pool: str = "default",
) -> Encoder:
    """Load the vision tower that a name stands for, frozen and ready to encode.

    Neither text tower nor tokenizer is built or downloaded, the global random state is left as
    it was, and a checkpoint that could run code is refused.

    Parameters
    ----------
    name
        A short name of ``cxr-cache encoders``, such as ``biomedclip``, or
        ``hf-hub:ORG/REPO`` or ``hf-hub:ORG/REPO@REVISION``: from the Hugging Face cache, else
        from the hub. ``local-dir:PATH``: a folder with ``open_clip_config.json`` and weights, or
        with ``config.json``, weights and ``preprocessor_config.json`` as transformers writes them
        for DINOv2, DINOv3, ViT, CLIP and SigLIP.
        ``local-file:PATH``: a file of weights, read as the configuration beside it says, which the
        identity then notes. Without one it may be of OpenAI's CLIP (CheXzero), of the
        repositories of DINOv2 (RAD-DINO, CheXFound) and DINOv3, or of EVA-X, with a
        ``preprocessor_config.json`` beside them or a note on what was assumed. A folder or
        repository may hold such weights, too: ``?file=NAME`` behind its name says which.
        ``chexzero?file=PATH`` and ``chexfound?file=PATH``: theirs, prepared for as their authors
        do.
        ``timm:NAME``: timm's published weights.
        ``ARCHITECTURE/TAG`` as open_clip lists them (``ViT-B-32/laion2b_s34b_b79k``).
        ``random:TIMM_NAME`` or ``random:TIMM_NAME:SEED``: seeded random weights.
        Any of them may end in ``?img_size=224``, for images of another size than the encoder's own,
        a multiple of its patches'; position embeddings are resampled, which the identity records.
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, or ``"auto"`` for the best there is.
    precision
        ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: bf16 where the processor computes it
        natively, else fp32.
    resize
        ``"squash"``, ``"crop"`` or ``"pad"`` override what the encoder's configuration says; None
        keeps it.
    normalize
        ``"encoder"`` for its own mean and standard deviation, ``"imagenet"`` for ImageNet's.
    bits_stored
        Bits in use in 16-bit grey files, None for all; recorded with the preprocessing.
    antialias
        False resizes as ``tf.image.resize`` does, without smoothing; only by bilinear
        interpolation.
    pool
        ``"default"`` for the encoder's own embedding. ``"cls"``, ``"mean"`` and ``"cls+mean"``
        take the class token, the mean over patches or both, after the final norm and without
        projection.

    Returns
    -------
    Encoder
        Its ``identity`` says which weights these are.

    Raises
    ------
    EncoderError
        The name is unknown, a file is missing, damaged or of another model, the hub cannot be
        reached, or the device does not exist. The message names the file and the remedy.
    ConfigError
        `resize`, `normalize`, `precision`, `bits_stored`, `antialias` or `pool` is out of range.

    Examples
    --------
    >>> import torch
    >>> encoder = load_encoder("random:test_vit:7", precision="fp32")
    >>> pooled, embedding = encoder.encode(torch.zeros(2, 3, 160, 160, dtype=torch.uint8))
    >>> embedding.shape, encoder.identity.is_random
    (torch.Size([2, 512]), True)
    """
    require_choice("resize", resize, (None, "squash", "crop", "pad"))
    require_choice("normalize", normalize, ("encoder", "imagenet"))
    require_choice("pool", pool, POOLS)
    chosen_device = resolve_device(device)
    chosen_precision = resolve_precision(precision, chosen_device)
    family, source = find_encoder(name)
    with nullcontext() if source.weights is None else WithoutDrawing():
        visual = family.build(source)
    preprocessing = family.read_preprocessing(source, visual, resize, normalize, bits_stored)
    if normalize == "imagenet":
        source = replace(source, notes=(*source.notes, *_note_statistics(family, source, visual)))
    preprocessing = replace(preprocessing, antialias=antialias)
    family.fill(visual, source)
    split = family.split
    if pool != "default":
        visual, split = pool_otherwise(visual, pool, source.name), split_pooled
    return Encoder(visual.to(chosen_device), split(visual), preprocessing, chosen_precision, source)


def _note_statistics(family: Family, source: Source, visual: nn.Module) -> Iterator[str]:
    """Say where ImageNet's statistics of pixels are not the encoder's own."""
    try:
        own = family.read_preprocessing(source, visual, "squash", "encoder", None)
    except EncoderError:  # it states none
        return
    if (own.mean, own.std) != (IMAGENET["mean"], IMAGENET["std"]):
        mean, std = (", ".join(f"{n:.4g}" for n in numbers) for numbers in (own.mean, own.std))
        yield (
            f"Pixels were normalised by ImageNet's mean and standard deviation, not by those that "
            f"{source.name} was trained with (mean {mean}; standard deviation {std}): its features "
            "are worse than they could be. Extract again without --normalize imagenet."
        )


def reload_encoder(
    recorded: Mapping[str, Any], *, model: str | None = None, device: str = "auto"
) -> Encoder:
    """Load the encoder that a store or a run says it was made with.

    `model` is its name where it lies elsewhere now; None takes the recorded one. It may still
    differ in its weights: compare the identities.

    Raises
    ------
    EncoderError
        `recorded` is no identity, or the encoder cannot be loaded.
    """
    options = recorded_options(recorded)
    return load_encoder(**vars(replace(options, name=model or options.name, device=device)))


def recorded_options(recorded: Mapping[str, Any]) -> EncoderOptions:
    """Give the options that load the encoder of a recorded identity, on any device.

    Raises
    ------
    EncoderError
        `recorded` is no identity.
    """
    identity = EncoderIdentity.from_dict(recorded)
    preprocessing = identity.preprocessing
    is_imagenet = {name: tuple(preprocessing.get(name, ())) for name in IMAGENET} == IMAGENET
    return EncoderOptions(
        identity.name,
        precision=identity.precision,
        resize=preprocessing.get("resize"),
        normalize="imagenet" if is_imagenet else "encoder",
        bits_stored=preprocessing.get("bits_stored"),
        antialias=preprocessing.get("antialias", True),
        pool=identity.pool,
    )
