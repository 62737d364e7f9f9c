"""Ids of patients and studies as keyed hashes, and where the key is kept."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from pathlib import Path

from cxr_cache.errors import ConfigError

logger = logging.getLogger(__name__)

MIN_KEY_BYTES = 16


def default_key_path() -> Path:
    """The key file of this user, which all data sets share: what is linked once stays linked."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "cxr-cache" / "id_key"


def load_key(path: str | Path | None = None) -> bytes:
    """Read the secret that ids are hashed with; the user's own is made when first needed.

    The key is never written into a store. Whoever has the key and a list of patients can tell who
    is who, so it stays with the data; whoever has only the store cannot.

    Parameters
    ----------
    path
        A file that the user names; it must exist. None takes :func:`default_key_path`.

    Raises
    ------
    ConfigError
        The file is missing, unreadable or too short, or cannot be written.
    """
    file = Path(path) if path is not None else default_key_path()
    try:
        if path is None and not file.exists():
            _write_new_key(file)
        key = file.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"The key {file}, by which ids of patients are hashed, cannot be used: "
            f"{error.strerror}. Name the file of a key by --id-key, made for example by "
            "`openssl rand -hex 32 > FILE`, or keep the ids as they are by --keep-ids."
        ) from error
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"The key {file} has {len(key)} bytes; ids could be guessed by less than "
            f"{MIN_KEY_BYTES}. Make one by `openssl rand -hex 32 > FILE`."
        )
    return key


def _write_new_key(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.touch(mode=0o600)
    new.write_text(secrets.token_hex(32) + "\n")
    try:
        os.link(new, file)  # unlike a rename, this leaves a key that another process made meanwhile
        logger.warning(
            "made the key %s, by which ids of patients are hashed; with another key the same "
            "patients get other ids, so keep it, and keep it out of what you share",
            file,
        )
    except FileExistsError:
        pass
    finally:
        new.unlink()


def hash_id(key: bytes, kind: str, value: str) -> str:
    """Give the pseudonym of an id: 20 hex digits of HMAC-SHA256, others for another `kind`.

    Among a million ids, two share a pseudonym with a probability of 4e-13.

    Examples
    --------
    >>> hash_id(b"secret", "patient", "MRN 1") == hash_id(b"secret", "patient", "MRN 1")
    True
    """
    return hmac.new(key, f"{kind}\0{value}".encode(), hashlib.sha256).hexdigest()[:20]
