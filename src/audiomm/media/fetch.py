"""Where bytes come from: a path, bytes, a file object, a data URI or base64, or, where allowed, a URL.

Fetching what a stranger names is a way into a private network (CVE-2025-6242 in vLLM's media connector is one of many),
so URLs are off unless the caller turns them on, private addresses are off unless the caller names the host, every
redirect is checked like the first address, and size and time are limited.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..base.errors import (
    AudioDecodeError,
    AudioFileNotFoundError,
    AudioLimitError,
    ImageDecodeError,
    ImageFileNotFoundError,
    ImageLimitError,
    InputError,
    VideoDecodeError,
    VideoFileNotFoundError,
    VideoLimitError,
)

_CHUNK_BYTES = 1 << 20
#: Names of more characters are cut in messages; text of fewer is a path and no base64.
_LONG_NAME, _SHORTEST_BASE64 = 300, 256


@dataclass(frozen=True)
class FetchLimits:
    """What may be fetched.

    Attributes:
        allow_urls: Whether http and https addresses are fetched at all.
        allowed_hosts: Host names that may be fetched from, private ones included; None is any public host. Naming
            hosts turns `allow_urls` on.
        max_bytes: Of a download, a data URI or a file object.
        timeout_seconds: For a whole download.
    """

    allow_urls: bool = False
    allowed_hosts: Collection[str] | None = None
    max_bytes: int = 1 << 30
    timeout_seconds: float = 60.0


@dataclass(frozen=True)
class Medium:
    """What is fetched: its names for messages, an example of its MIME type, and the errors that tell of it."""

    noun: str
    file: str
    mime: str
    broken: type[InputError]
    missing: type[InputError]
    too_large: type[InputError]


AUDIO = Medium("audio", "an audio file", "audio/wav", AudioDecodeError, AudioFileNotFoundError, AudioLimitError)
IMAGE = Medium("a picture", "a picture file", "image/png", ImageDecodeError, ImageFileNotFoundError, ImageLimitError)
VIDEO = Medium("a video", "a video file", "video/mp4", VideoDecodeError, VideoFileNotFoundError, VideoLimitError)


def fetch(
    source: str | os.PathLike[str] | bytes | BinaryIO, limits: FetchLimits | None = None, medium: Medium = AUDIO
) -> Path | bytes:
    """A path that is a file, or the bytes themselves.

    Raises:
        AudioFileNotFoundError: There is no such file. (This and the next two are those of `medium`.)
        AudioDecodeError: A folder, an empty file, a broken data URI, or a download that failed.
        AudioLimitError: More bytes than allowed.
        InputError: A URL, and URLs are not allowed.
        TypeError: Something else.
    """
    limits = limits or FetchLimits()
    if isinstance(source, (bytes, bytearray, memoryview)):
        content = bytes(source)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        content = _data_uri(source, limits.max_bytes, medium)
    elif isinstance(source, str) and "://" in source[:12]:
        content = _download(source, limits, medium)
    elif isinstance(source, (str, os.PathLike)):
        bare = _bare_base64(source) if isinstance(source, str) else None
        if bare is None:
            return _file(source, medium)
        if len(bare) > limits.max_bytes:
            raise medium.too_large(f"the base64 holds {len(bare)} bytes; {limits.max_bytes} are allowed (max_bytes=).")
        content = bare
    elif hasattr(source, "read"):
        content = _read(source, limits.max_bytes, "the file object", medium)
    else:
        raise TypeError(
            f"{type(source).__name__} is not {medium.noun}: a path, bytes, a binary file object, a data URI or a URL "
            "is needed."
        )
    if len(content) == 0:
        raise medium.broken(f"{medium.noun} that is empty (0 bytes) cannot be read.")
    return content


def describe(source: Any) -> str:
    """A short name of `source` for messages."""
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        name = name if isinstance(name, str) else os.fsdecode(name)
        return name[:40] + "..." if name[:5].lower() == "data:" or len(name) > _LONG_NAME else name
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else f"<{type(source).__name__}>"


def _file(source: str | os.PathLike[str], medium: Medium) -> Path:
    path = Path(source).expanduser()
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", error)
        raise medium.missing(f"{describe(source)[:300]}: {reason}. Pass the path of {medium.file}.") from error
    if not path.is_file():
        raise medium.broken(f"{os.fspath(source)!r} is not a file. Pass the path of {medium.file}.")
    if status.st_size == 0:
        raise medium.broken(f"{path}: empty file (0 bytes).")
    return path


def _bare_base64(text: str) -> bytes | None:
    """What base64 without the head of a data URI holds; None for what is none, or the path of a file."""
    if len(text) < _SHORTEST_BASE64:
        return None
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    try:
        return None if Path(text).exists() else content
    except OSError:
        # Too long for the name of a file.
        return content


def _data_uri(uri: str, max_bytes: int, medium: Medium) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or ";base64" not in head.lower():
        raise medium.broken(f"the data URI {head[:60]!r} is not of the form 'data:{medium.mime};base64,...'.")
    if len(body) * 3 // 4 > max_bytes + 3:
        raise medium.too_large(f"the data URI holds {len(body) * 3 // 4} bytes; {max_bytes} are allowed (max_bytes=).")
    try:
        return base64.b64decode(urllib.parse.unquote(body), validate=True)
    except binascii.Error as error:
        raise medium.broken(f"the data URI {head[:60]!r} does not hold valid base64: {error}.") from error


def _read(
    file: BinaryIO | http.client.HTTPResponse,
    max_bytes: int,
    name: str,
    medium: Medium,
    deadline_seconds: float | None = None,
) -> bytes:
    """All bytes of `file`, up to the limit and up to a time.monotonic() deadline."""
    pieces: list[bytes] = []
    size = 0
    # read1 returns what has come, so that a server that drips cannot hold the deadline up
    read = file.read if deadline_seconds is None else file.read1  # type: ignore[union-attr]
    if getattr(file, "closed", False) or not getattr(file, "readable", lambda: True)():
        raise InputError(f"{name} is closed or was not opened for reading: open(path, 'rb') opens it.")
    while piece := read(_CHUNK_BYTES):
        if not isinstance(piece, (bytes, bytearray)):
            raise TypeError(f"{name} gives {type(piece).__name__}: open it in binary mode, open(path, 'rb').")
        size += len(piece)
        if size > max_bytes:
            raise medium.too_large(f"{name} holds more than the {max_bytes} bytes allowed (max_bytes=).")
        if deadline_seconds is not None and time.monotonic() > deadline_seconds:
            raise medium.broken(f"{name} did not arrive in time: {size} bytes came (timeout_seconds=).")
        pieces.append(bytes(piece))
    return b"".join(pieces)


def _check_address(url: str, limits: FetchLimits, medium: Medium) -> None:
    """Refuse a URL that may not be fetched.

    Raises:
        InputError: URLs are off, the scheme is not http(s), or the host is not allowed.
    """
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or "").lower()
    shown = f"{parts.scheme}://{host}"
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise InputError(
            f"{shown}...: of addresses only http and https ones are fetched. Pass the path of a file that is here."
        )
    if not limits.allow_urls and limits.allowed_hosts is None:
        raise InputError(
            f"{shown}...: URLs are not fetched. Download the file first, or pass allow_urls=True, or better "
            f"allowed_hosts=[{host!r}]."
        )
    if limits.allowed_hosts is not None:
        if host not in {allowed.lower() for allowed in limits.allowed_hosts}:
            raise InputError(
                f"{shown}...: the host {host!r} is not among allowed_hosts={sorted(limits.allowed_hosts)}."
            )
        return
    try:
        found = socket.getaddrinfo(host, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError as error:
        raise medium.broken(f"{shown}...: the host {host!r} cannot be found ({error}).") from error
    for *_, address in found:
        if not ipaddress.ip_address(str(address[0]).split("%")[0]).is_global:
            raise InputError(
                f"{shown}...: {address[0]} is not a public address; name the host in allowed_hosts to fetch from it."
            )


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Checks every address a redirect leads to."""

    def __init__(self, limits: FetchLimits, medium: Medium) -> None:
        self._limits, self._medium = limits, medium

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        _check_address(newurl, self._limits, self._medium)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, limits: FetchLimits, medium: Medium) -> bytes:
    _check_address(url, limits, medium)
    opener = urllib.request.build_opener(_CheckedRedirects(limits, medium))
    request = urllib.request.Request(url, headers={"User-Agent": "audiomm"})
    deadline = time.monotonic() + limits.timeout_seconds
    shown = url.split("?")[0][:200]
    try:
        with opener.open(request, timeout=limits.timeout_seconds) as answer:
            declared = answer.length or 0
            if declared > limits.max_bytes:
                raise medium.too_large(f"{shown} holds {declared} bytes; {limits.max_bytes} are allowed (max_bytes=).")
            content = _read(answer, limits.max_bytes, shown, medium, deadline)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise medium.broken(f"{shown} could not be fetched: {error}.") from error
    if declared and len(content) < declared:
        raise medium.broken(f"{shown} broke off: {len(content)} of {declared} bytes came.")
    return content
