# SPDX-License-Identifier: Apache-2.0
"""Where shards are stored: a local folder, an HTTP server, S3 or other storage that energon reads."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.metadata import check_dataset_info_present
from multistorageclient.config import PROTOCOL_TO_PROVIDER_TYPE_MAPPING

from megatron_smar.credentials import check_address, redacted
from megatron_smar.data import http_storage

http_storage.register()

PREPARE = "make it with `python tools/data/prepare.py --train RECORDS.json --image-root IMAGES --output FOLDER`"
META_FOLDER = ".nv-meta"
_META = f"{META_FOLDER}/dataset.yaml"
_REMOTE = ("msc", *(protocol for protocol in PROTOCOL_TO_PROVIDER_TYPE_MAPPING if protocol != "file"))


def energon_path(path: str) -> str:
    """Returns `path` in the form that energon reads.

    energon reads remote storage through the Multi-Storage Client, as `msc://PROFILE/PATH`. `http://HOST/PATH` and
    `s3://BUCKET/PATH` need no profile: the client's name for such storage is `msc://_http-HOST/PATH`.
    """
    url = urlsplit(path)
    if not _is_remote(path) or url.scheme == "msc":
        return path
    return f"msc://_{url.scheme}-{url.netloc}{url.path}"


def check_data_path(path: str, flag: str) -> None:
    """Checks that `path` has prepared shards or is an energon metadataset file.

    If a server cannot be reached, the check fails after three attempts.

    Raises:
        ValueError: There is neither; the message names `flag` and the command that makes shards.
    """
    if "://" in path:
        _check_url(path, flag)
        return
    place = Path(path)
    if not place.exists():
        raise ValueError(f"{flag} {path} does not exist: {PREPARE}.")
    if place.is_dir() and not (place / _META).is_file():
        raise ValueError(f"{flag} {path} has no {_META}, so it holds no prepared shards: {PREPARE}.")
    if place.is_file() and place.suffix != ".yaml":
        raise ValueError(f"{flag} {path} is neither a folder of shards nor an energon metadataset .yaml: {PREPARE}.")


def _check_url(path: str, flag: str) -> None:
    check_address(path, flag)
    if not _is_remote(path):
        known = ", ".join(f"{protocol}://" for protocol in _REMOTE)
        raise ValueError(f"{flag} {path} is not an address that can be read: give a local folder, or one of {known}.")
    try:
        place = EPath(energon_path(path))
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{flag} {path} names storage that cannot be used ({reason(error)}): describe its profile in the file "
            "that MSC_CONFIG names, and install what its kind of storage needs (S3: pip install 'megatron_smar[s3]')."
        ) from error
    try:
        if path.endswith(".yaml"):
            place.stat()
            return
        (place / _META).stat()
        if not check_dataset_info_present(place):
            raise FileNotFoundError(".nv-meta/.info.json is missing")
    except FileNotFoundError as error:
        raise ValueError(
            f"{flag} {path} holds no prepared shards ({reason(error)}): {PREPARE}, and copy the folder there with "
            "all files whose names begin with a dot."
        ) from error
    except Exception as error:  # each kind of storage has its own errors
        raise ValueError(
            f"{flag} {path} cannot be read ({reason(error)}): check the address, the server and the credentials."
        ) from error


def _is_remote(path: str) -> bool:
    return "://" in path and urlsplit(path).scheme in _REMOTE


def reason(error: BaseException) -> str:
    """Returns the innermost cause of an error, on one line: the client wraps the storage's error in its own."""
    while error.__cause__ is not None and not isinstance(error, FileNotFoundError):
        error = error.__cause__
    return " ".join(redacted(str(error)).split()).rstrip(".") or type(error).__name__
