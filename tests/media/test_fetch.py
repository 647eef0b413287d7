"""Bytes are fetched only from where the caller allows."""

from __future__ import annotations

import base64
import http.server
import io
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from audiomm.base.errors import AudioDecodeError, AudioFileNotFoundError, AudioLimitError, InputError
from audiomm.media import load_audio
from audiomm.media.fetch import FetchLimits, fetch


class Handler(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes] = {}

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "http://localhost:1/secret")
            self.end_headers()
            return
        content = self.files.get(self.path)
        self.send_response(200 if content is not None else 404)
        if content is not None and self.path != "/drip":
            self.send_header("Content-Length", str(len(content) + (self.path == "/short") * 10))
        self.end_headers()
        if self.path == "/drip":
            for _ in range(20):
                self.wfile.write(b"x")
                time.sleep(0.1)
        elif content is not None:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests speak."""


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_urls_are_off_unless_allowed():
    with pytest.raises(InputError, match=r"URLs are not fetched.*allowed_hosts=\['example.org'\]"):
        load_audio("https://example.org/speech.wav?key=secret")


def test_a_named_host_is_fetched_from(server, tone, encode):
    Handler.files = {"/tone.wav": encode(tone, subtype="FLOAT")}
    np.testing.assert_array_equal(load_audio(f"{server}/tone.wav", allowed_hosts=["127.0.0.1"]), tone)


def test_other_hosts_are_not(server):
    with pytest.raises(InputError, match=r"'127\.0\.0\.1' is not among allowed_hosts=\['example\.org'\]"):
        load_audio(f"{server}/tone.wav", allowed_hosts=["example.org"])


def test_private_addresses_must_be_named(server):
    with pytest.raises(InputError, match=r"127\.0\.0\.1 is not a public address"):
        load_audio(f"{server}/tone.wav", allow_urls=True)


def test_a_redirect_is_checked_too(server):
    with pytest.raises(InputError, match="'localhost' is not among allowed_hosts"):
        load_audio(f"{server}/moved", allowed_hosts=["127.0.0.1"])


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://example.org/a.wav", "http:///a.wav"])
def test_only_http_is_fetched(url):
    with pytest.raises(InputError, match="only http and https"):
        load_audio(url, allow_urls=True)


def test_a_download_has_limits(server):
    Handler.files = {"/big": bytes(2_000_000), "/drip": b"", "/short": bytes(100)}
    hosts = ["127.0.0.1"]
    with pytest.raises(AudioLimitError, match="holds 2000000 bytes; 1000000 are allowed"):
        load_audio(f"{server}/big", allowed_hosts=hosts, max_bytes=1_000_000)
    with pytest.raises(AudioDecodeError, match="did not arrive in time"):
        load_audio(f"{server}/drip", allowed_hosts=hosts, timeout_seconds=0.5)
    with pytest.raises(AudioDecodeError, match=r"100 of 110 bytes|IncompleteRead"):
        load_audio(f"{server}/short", allowed_hosts=hosts)
    with pytest.raises(AudioDecodeError, match="could not be fetched: HTTP Error 404"):
        load_audio(f"{server}/nothing", allowed_hosts=hosts)


def test_a_name_that_does_not_resolve_is_told():
    with pytest.raises(AudioDecodeError, match=r"'nowhere\.invalid' cannot be found"):
        load_audio("http://nowhere.invalid/a.wav", allow_urls=True)


def test_file_objects_and_data_uris_have_limits():
    with pytest.raises(AudioLimitError, match="more than the 10 bytes allowed"):
        load_audio(io.BytesIO(bytes(11)), max_bytes=10)
    with pytest.raises(AudioLimitError, match="300 bytes; 10 are allowed"):
        load_audio("data:audio/wav;base64," + base64.b64encode(bytes(300)).decode(), max_bytes=10)


def test_a_text_file_object_is_refused():
    with pytest.raises(TypeError, match="open it in binary mode"):
        load_audio(io.StringIO("la la"))


def test_a_file_object_that_cannot_be_read_is_told(tmp_path):
    with open(tmp_path / "new.wav", "wb") as file, pytest.raises(InputError, match="not opened for reading"):
        load_audio(file)
    with pytest.raises(InputError, match="is closed or was not opened"):
        load_audio(file)


@pytest.mark.parametrize("uri", ["data:audio/wav,abc", "data:audio/wav;base64", "data:audio/wav;base64,@@@@"])
def test_a_broken_data_uri_is_told(uri):
    with pytest.raises(AudioDecodeError, match="the data URI"):
        load_audio(uri)


def test_what_is_no_source_is_a_type_error():
    with pytest.raises(TypeError, match="int is not audio"):
        fetch(5, FetchLimits())


def test_long_text_that_is_no_file_is_told_in_a_short_sentence():
    for text in ("x!" * 5000, "ab/cd" * 200 + "."):
        with pytest.raises(AudioFileNotFoundError) as raised:
            load_audio(text)
        assert len(str(raised.value)) < 400
    with pytest.raises(AudioLimitError, match="the base64 holds 300 bytes"):
        load_audio(base64.b64encode(bytes(300)).decode(), max_bytes=10)
