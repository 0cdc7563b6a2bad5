# SPDX-License-Identifier: Apache-2.0
"""Shards on a plain HTTP or HTTPS server, as a storage provider of the Multi-Storage Client that energon reads through.

The client (1.3) knows S3, GCS, Azure, OCI, AIStore and Hugging Face, but not HTTP, and its configuration cannot name
a custom provider; `register` therefore adds this one to the client's tables.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import IO, Any, NoReturn
from urllib.parse import urlsplit

import multistorageclient.config as msc_config
import requests
from multistorageclient import providers
from multistorageclient.providers.base import BaseStorageProvider
from multistorageclient.types import ObjectMetadata, Range, RetryableError

from megatron_smar.credentials import redacted

PROTOCOLS = ("http", "https")
_TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next bytes
_CHUNK = 1 << 20


class HttpStorageProvider(BaseStorageProvider):
    """Reads files from a server. Writing is not supported, nor is listing, which HTTP does not have.

    Proxies, certificates and passwords are those of `requests`: HTTPS_PROXY, REQUESTS_CA_BUNDLE, .netrc.

    Args:
        base_path: `host` or `host:port`, optionally followed by a path.
        scheme: `http` or `https`.
        options: Options that the Multi-Storage Client passes to every provider.
    """

    def __init__(self, base_path: str, scheme: str = "https", **options: Any) -> None:
        super().__init__(base_path=base_path, provider_name=scheme, **options)
        self._scheme = scheme

    def _request(self, method: str, path: str, byte_range: Range | None = None) -> requests.Response:
        """Sends one request; the client retries after a RetryableError, three times by default.

        Raises:
            FileNotFoundError: The server does not return the file; the message contains its answer.
            RetryableError: The server cannot be reached, or reports that it is busy or has failed.
        """
        url = f"{self._scheme}://{path}"
        headers = {"Accept-Encoding": "identity"}  # sizes and ranges refer to the file itself
        if byte_range:
            headers["Range"] = f"bytes={byte_range.offset}-{byte_range.offset + byte_range.size - 1}"
        try:
            response = _session(os.getpid()).request(
                method, url, headers=headers, timeout=_TIMEOUT, stream=True, allow_redirects=True
            )
        except (requests.ConnectionError, requests.Timeout) as error:
            # `from None`: the chained error would be printed too, with the query of an address it was redirected to.
            server = f"{self._scheme}://{urlsplit(url).netloc}"
            raise RetryableError(f"{server} cannot be reached ({redacted(str(error))})") from None
        if response.status_code == 429 or response.status_code >= 500:
            raise RetryableError(f"{url}: the server answered {response.status_code} {response.reason}")
        # For a folder, servers redirect to its name with a slash, whether or not they list it.
        if not response.ok or urlsplit(response.url).path.endswith("/"):
            raise FileNotFoundError(f"{url}: the server answered {response.status_code} {response.reason}")
        return response

    def _get_object_metadata(self, path: str, strict: bool = True) -> ObjectMetadata:
        with self._request("HEAD", path) as response:
            headers = response.headers
        if "Content-Length" not in headers:
            raise RuntimeError(f"{self._scheme}://{path}: the server does not report the file's size (Content-Length)")
        modified = headers.get("Last-Modified")
        return ObjectMetadata(
            key=path,
            content_length=int(headers["Content-Length"]),
            last_modified=parsedate_to_datetime(modified) if modified else datetime.fromtimestamp(0, UTC),
            etag=headers.get("ETag"),
        )

    def _get_object(self, path: str, byte_range: Range | None = None) -> bytes:
        with self._request("GET", path, byte_range) as response:
            if byte_range and response.status_code != 206:
                raise RuntimeError(
                    f"{redacted(response.url)}: the server sends full files only (it does not support Range), but a "
                    "file of this size has to be read in parts"
                )
            return b"".join(_chunks(response))

    def _download_file(self, remote_path: str, f: str | IO, metadata: ObjectMetadata | None = None) -> int:
        if isinstance(f, str):
            with open(f, "wb") as file:
                return self._download_file(remote_path, file, metadata)
        if isinstance(f, io.TextIOBase):
            return f.write(self._get_object(remote_path).decode("utf-8"))
        start = f.tell()
        with self._request("GET", remote_path) as response:
            try:
                return sum(f.write(chunk) for chunk in _chunks(response))
            except RetryableError:
                f.seek(start)  # the next attempt starts over
                f.truncate()
                raise

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{self._scheme}:// storage is read-only, and has no listing")

    _put_object = _copy_object = _delete_object = _make_symlink = _upload_file = _refuse

    def _list_objects(self, *args: Any, **kwargs: Any) -> Iterator[ObjectMetadata]:
        self._refuse()


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """Yields the body in chunks; `requests` checks its length, and a body that ends early is an error."""
    try:
        yield from response.iter_content(_CHUNK)
    except requests.RequestException as error:
        raise RetryableError(redacted(f"{response.url}: the connection broke ({error})")) from None


@lru_cache(maxsize=1)
def _session(process: int) -> requests.Session:
    """Returns this process's connections: a forked data worker must not use those of its parent."""
    return requests.Session()


def register() -> None:
    """Registers `msc://_http-HOST:PORT/PATH`, and the same for https, with the Multi-Storage Client.

    This is the client's naming scheme for storage that needs no profile, as in `msc://_s3-BUCKET/PATH`.
    """
    for protocol in PROTOCOLS:
        name = f"{protocol.title()}StorageProvider"
        setattr(providers, name, partial(HttpStorageProvider, scheme=protocol))
        msc_config.STORAGE_PROVIDER_MAPPING[protocol] = name
        msc_config.PROTOCOL_TO_PROVIDER_TYPE_MAPPING[protocol] = protocol
    known: Any = msc_config.SUPPORTED_IMPLICIT_PROFILE_PROTOCOLS
    msc_config.SUPPORTED_IMPLICIT_PROFILE_PROTOCOLS = (*known, *(p for p in PROTOCOLS if p not in known))
