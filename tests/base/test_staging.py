"""Saving over a checkpoint: killed at any step it leaves the old or the new one; a disk that is too small says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from audiomm import AutoConfig, WhisperForConditionalGeneration
from audiomm.base.errors import CorruptCheckpointError, SaveError
from audiomm.base.staging import settle, staged

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "chmod")


class Died(BaseException):
    """What kill -9 is to a process: nothing is tidied up after it."""


def saved(model, folder, size, fill):
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(fill)
    model.config.dropout = fill
    model.save_pretrained(folder, max_shard_size=size)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("40KB", "5GB"),
        pytest.param("5GB", "40KB", marks=pytest.mark.slow),
        pytest.param("40KB", "60KB", marks=pytest.mark.slow),
    ],
)
def test_a_save_that_dies_at_any_step_leaves_the_old_or_the_new(old, new, tiny_whisper, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    saved(tiny_whisper, tmp_path / "fresh", new, 0.75)
    fresh = sorted(path.name for path in (tmp_path / "fresh").iterdir())
    last, seen = 0, set()
    while True:
        last += 1
        folder = tmp_path / str(last)
        saved(tiny_whisper, folder, old, 0.25)
        left = last

        def dying(real):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    raise Died
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(Path, name, dying(getattr(Path, name)))
            patch.setattr(os, "fsync", dying(os.fsync))
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            try:
                saved(tiny_whisper, folder, new, 0.5)
            except Died:
                pass
            else:
                break
        model = WhisperForConditionalGeneration.from_pretrained(folder)
        values = {value.flatten()[0].item() for value in model.state_dict().values()} | {model.config.dropout}
        assert values in ({0.25}, {0.5}), (last, values)
        seen |= values
        with monkeypatch.context() as patch:
            patch.setattr("audiomm.base.staging._is_running", lambda process: False)
            saved(tiny_whisper, folder, new, 0.75)
        assert AutoConfig.from_pretrained(folder).dropout == 0.75
        assert sorted(path.name for path in folder.iterdir()) == fresh, "litter is gone"
    assert seen == {0.25, 0.5}
    assert last > 10


def test_litter_of_a_process_that_is_gone_is_removed_and_that_of_others_is_not(tiny_whisper, tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for process in (gone.stdout.decode().strip(), str(os.getppid()), "x"):
        (tmp_path / f".saving-{process}").mkdir()
    tiny_whisper.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob(".saving-*")] == [f".saving-{os.getppid()}"]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tiny_whisper, tiny_whisper_folder, tmp_path, monkeypatch
):
    before = {path.name: path.read_bytes() for path in tiny_whisper_folder.iterdir()}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    needed = 4 * sum(value.numel() for value in tiny_whisper.parameters())
    with pytest.raises(SaveError, match=rf"{needed:,} bytes are needed and 1,000 are free"):
        tiny_whisper.save_pretrained(tiny_whisper_folder)
    assert {path.name: path.read_bytes() for path in tiny_whisper_folder.iterdir()} == before


def test_a_move_that_cannot_be_ended_says_what_to_do(tmp_path, monkeypatch):
    stage = tmp_path / ".saved"
    stage.mkdir()
    (stage / "config.json").write_text("{}")

    def refuse(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(CorruptCheckpointError, match=r"Read-only file system.*move the files of .*\.saved to"):
        AutoConfig.from_pretrained(tmp_path)


def test_what_a_stranger_put_there_reaches_nothing_outside(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    folder = tmp_path / "model"
    (folder / ".saved").mkdir(parents=True)
    (folder / ".saved" / "replaced.json").write_text(json.dumps(["../outside.txt"]))
    settle(folder)
    assert outside.read_text() == "mine"
    assert not (folder / ".saved").exists()
    (folder / ".saved").symlink_to(tmp_path)
    settle(folder)
    assert outside.exists()


def test_a_block_that_fails_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), staged(tmp_path, ["a"]) as stage:
        (stage / "a").write_text("new")
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
