"""Files from a hub: a real server on this machine, a real download, a real cache."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import audiomm
from audiomm import CheckpointNotFoundError, ConfigError, SaveError
from audiomm.base.hub import Source, atomic_write, make_folder, read_json, write_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_whisper_folder):
    """The address of a hub with one repository, someone/tiny, and what was asked of it."""
    asked = []
    cut_short = {"someone/broken"}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            asked.append((self.command, self.path, self.headers.get("authorization")))
            repo, _, rest = self.path.strip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            path = tiny_whisper_folder / name
            if repo not in {"someone/tiny", *cut_short} or revision not in {"main", "v1", COMMIT}:
                code = "RevisionNotFound" if repo == "someone/tiny" else "RepoNotFound"
                self.send_response(404 if repo == "someone/tiny" else 401)
                self.send_header("X-Error-Code", code)
                self.end_headers()
                return
            if not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                return
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data[: len(data) // 2] if repo in cut_short else data)
                self.close_connection = True

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def load(address, cache, code):
    """Run code in a process of its own, as the address of the hub is read when huggingface_hub is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": address,
        "PYTHONPATH": str(Path(audiomm.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"HF_HOME": str(cache / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    program = f"import audiomm\nfrom audiomm import *\ncache = {str(cache)!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_repository_is_fetched_once_and_then_read_from_the_cache(hub, tmp_path):
    address, asked = hub
    out = load(
        address,
        tmp_path,
        """
load = audiomm.AutoModelForSpeechSeq2Seq.from_pretrained
model = load("someone/tiny", cache_dir=cache, revision="v1", token="secret")
print(type(model).__name__, model.config.d_model)
model = load("someone/tiny", cache_dir=cache, revision="v1", local_files_only=True)
print(model.generation_config.eos_token_id)
for name, options in {"someone/nothing": {}, "someone/tiny": {"revision": "v9"}}.items():
    try:
        audiomm.AutoConfig.from_pretrained(name, cache_dir=cache, **options)
    except audiomm.CheckpointNotFoundError as error:
        print("refused", error)
""",
    )
    lines = out.splitlines()
    assert lines[:2] == ["WhisperForConditionalGeneration 24", "2"]
    assert "'someone/nothing' (revision main) cannot be read from the hub" in lines[2]
    assert "(revision v9)" in lines[3]
    assert ("Bearer secret") in {token for _, _, token in asked}
    fetched = [path for method, path, _ in asked if method == "GET"]
    assert len(fetched) == len(set(fetched))


def test_a_download_that_breaks_off_is_told_and_nothing_half_is_read(hub, tmp_path):
    address, _ = hub
    out = load(
        address,
        tmp_path,
        """
import time
time.sleep = lambda seconds: None
for attempt in range(2):
    try:
        audiomm.AutoModelForSpeechSeq2Seq.from_pretrained("someone/broken", cache_dir=cache)
    except audiomm.CheckpointNotFoundError as error:
        print("refused", error)
""",
    )
    first, second = out.splitlines()
    assert "config.json could not be fetched from the hub: " in first
    assert "config.json could not be fetched from the hub: " in second


def test_a_folder_beats_a_repository_of_the_same_name(tiny_whisper_folder, monkeypatch):
    monkeypatch.chdir(tiny_whisper_folder.parent)
    assert Source("tiny-whisper").require("config.json") == Path("tiny-whisper/config.json")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointNotFoundError, match="a file, not a folder"):
        Source(tmp_path / "x").find("config.json")


def test_json_files_hold_objects(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, {"ü": None}]})
    assert read_json(tmp_path / "a.json") == {"b": [1, {"ü": None}]}
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"a\.json is not readable JSON"):
        read_json(tmp_path / "a.json")


def test_a_write_that_fails_half_way_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError("stopped")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(SaveError, match="unchanged"), atomic_write(tmp_path / "a"):
        pass


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_folder_that_cannot_be_made_is_a_save_error(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(SaveError, match="cannot save to"):
        make_folder(tmp_path / "x" / "y")
