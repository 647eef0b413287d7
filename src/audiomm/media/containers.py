"""What kind of file some bytes are, and whether the file is whole.

libsndfile reads a cut wav or ogg file to where it ends and says nothing, so the sizes that RIFF, RF64 and AIFF chunks
declare are compared with the file here, and ogg pages are walked: each carries a checksum (RFC 3533), a number, and
the last one of a stream a mark.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_HEAD_BYTES = 64
#: Size fields hold this when the writer could not seek back, as in a pipe.
_UNKNOWN_SIZE = 0xFFFFFFFF

_READ_BY_LIBSNDFILE = (
    (b"RIFF", "wav"),
    (b"RIFX", "wav"),
    (b"RF64", "rf64"),
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (b"FORM", "aiff"),
    (b"caff", "caf"),
    (b".snd", "au"),
)
_READ_BY_PYAV = (
    (b"\x1a\x45\xdf\xa3", "webm or mkv"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "wma"),
    (b"#!AMR", "amr"),
)

_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class Container:
    """A kind of file.

    Attributes:
        name: What people call it; empty when unknown.
        start: How the file starts, for messages.
        needs_pyav: libsndfile cannot read it.
        noisy: Decoding it may write to standard error.
    """

    name: str
    start: str
    needs_pyav: bool = False
    noisy: bool = False


def sniff(source: Path | bytes) -> Container:
    """The kind of file, by its first bytes; names and extensions lie."""
    if isinstance(source, bytes):
        head = source[:_HEAD_BYTES]
    else:
        with source.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    start = head[:16].decode("ascii", errors="replace").encode("ascii", errors="replace").decode()
    for magic, name in _READ_BY_LIBSNDFILE:
        if head.startswith(magic):
            return Container(name, start)
    for magic, name in _READ_BY_PYAV:
        if head.startswith(magic):
            return Container(name, start, needs_pyav=True)
    if head[4:8] == b"ftyp":
        return Container("m4a or mp4", start, needs_pyav=True)
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return Container("aac", start, needs_pyav=True)
    if head.startswith(b"ID3") or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0):
        return Container("mp3", start, noisy=True)
    return Container("", start, noisy=True)


def damage(source: Path | bytes, kind: Container) -> str | None:
    """What is wrong with the file's frame, in words; None when it is whole or not of a kind that is checked here."""
    if kind.name in ("wav", "aiff"):
        with _opened(source) as file:
            return _chunk_damage(file)
    if kind.name == "ogg":
        return _ogg_damage(source if isinstance(source, bytes) else source.read_bytes())
    return None


def declared_rate(source: Path | bytes, kind: Container) -> int | None:
    """Samples a second that a wav header declares; None for other files."""
    if kind.name != "wav":
        return None
    with _opened(source) as file:
        for name, _, content in _chunks(file):
            if name == b"fmt " and len(content) >= 8:
                return int.from_bytes(content[4:8], "little")
    return None


def _opened(source: Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, bytes]]:
    """Name, declared bytes and first bytes of each chunk of a RIFF or AIFF file; the file stands at the chunk's end."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    order = "big" if file.read(4) in (b"FORM", b"RIFX") else "little"
    place = 12
    while place + 8 <= size:
        file.seek(place)
        name, length = file.read(4), int.from_bytes(file.read(4), order)  # type: ignore[arg-type]
        yield name, length, file.read(min(length, 16))
        place += 8 + length + length % 2


def _chunk_damage(file: BinaryIO) -> str | None:
    """Whether the samples' chunk of a wav or aiff file lies wholly inside the file."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[8:] not in (b"WAVE", b"AIFF", b"AIFC"):
        return None
    for name, length, content in _chunks(file):
        if name in (b"data", b"SSND"):
            present = size - file.tell() + len(content)
            unknown = length == _UNKNOWN_SIZE and head[4:8] == _UNKNOWN_SIZE.to_bytes(4, "big")
            if length <= present or unknown:
                return None
            return f"its header declares {length} bytes of samples, the file has {present}"
    return "its chunk of samples is missing"


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 of an ogg page: most significant bit first, no preset; zlib's runs the other way round."""
    backwards = zlib.crc32(page.translate(_REVERSED_BITS), _UNKNOWN_SIZE) ^ _UNKNOWN_SIZE
    return int.from_bytes(backwards.to_bytes(4, "little").translate(_REVERSED_BITS), "big")


def _ogg_damage(content: bytes) -> str | None:
    """The first broken page of an ogg file, or its missing end."""
    place, pages, ended = 0, 0, False
    expected: dict[bytes, int] = {}
    while place < len(content):
        if content[place : place + 4] != b"OggS" or place + 27 > len(content):
            break
        table = content[place + 27 : place + 27 + content[place + 26]]
        stop = place + 27 + content[place + 26] + sum(table)
        if stop > len(content):
            return f"ogg page {pages} is cut off at byte {len(content)}"
        blank = content[place : place + 22] + bytes(4) + content[place + 26 : stop]
        (checksum,) = struct.unpack_from("<I", content, place + 22)
        if _ogg_checksum(blank) != checksum:
            return f"ogg page {pages} at byte {place} does not match its checksum"
        serial, (number,) = content[place + 14 : place + 18], struct.unpack_from("<I", content, place + 18)
        flags = content[place + 5]
        if not flags & 2 and expected.get(serial, number) != number:
            return f"ogg page {pages} at byte {place} has number {number}, after {expected[serial] - 1}"
        expected[serial] = number + 1
        ended = bool(flags & 4)
        place, pages = stop, pages + 1
    if ended:
        return None
    if place < len(content):
        return f"there is no ogg page at byte {place}, after {pages} good ones"
    return f"the last of {pages} ogg pages does not end the stream"
