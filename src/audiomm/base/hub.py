"""From a name or a folder to local files: the one place that talks to huggingface_hub, and the one that writes files.

A `Source` is a folder, a hub repository or a model that ships inside this package; it hands out files by name.
Writing goes through `atomic_write`, so that a file is either the old one or the new one, whole, at any moment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointNotFoundError, ConfigError, SaveError
from .staging import settle

#: Models that ship with the package; asked for by the same name as one on the hub.
BUNDLED_MODELS = {"audiomm/whisper-commands": Path(__file__).parent.parent / "data" / "whisper-commands"}

_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")


@dataclass(frozen=True)
class Source:
    """Where the files of one checkpoint come from.

    Attributes:
        name: A folder, a hub id ("openai/whisper-tiny") or a bundled model's name.
        revision: Branch, tag or commit on the hub; None is the main branch.
        token: Hub token; True uses the one stored by `hf auth login`.
        cache_dir: Where downloads are kept; None is huggingface_hub's own folder.
        local_files_only: Look in the cache only, never on the network.
        subfolder: Folder inside the checkpoint that holds the files.
        force_download: Fetch again what the cache already holds.
    """

    name: str | os.PathLike[str]
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    subfolder: str = ""
    force_download: bool = False

    @classmethod
    def take(cls, name: str | os.PathLike[str], kwargs: dict[str, Any]) -> Source:
        """Make a source from `name`, removing the hub's options from `kwargs`."""
        if not isinstance(name, str | os.PathLike):
            raise CheckpointNotFoundError(
                f"{type(name).__name__} is no place to load from: pass a folder or a hub id like 'openai/whisper-tiny'."
            )
        options = {option: kwargs.pop(option) for option in _OPTIONS if option in kwargs}
        return cls(name, **{option: value for option, value in options.items() if value is not None})

    @property
    def folder(self) -> Path | None:
        """The local folder, or None when the files are on the hub.

        Raises:
            CheckpointNotFoundError: `name` is written like a path, and there is no such folder.
        """
        path = Path(self.name).expanduser()
        if path.is_dir():
            return path / self.subfolder
        if str(self.name) in BUNDLED_MODELS:
            return BUNDLED_MODELS[str(self.name)] / self.subfolder
        parts = str(self.name).split("/")
        if path.exists() or path.is_absolute() or parts[0] in {".", "..", "~"} or len(parts) > 2 or not all(parts):
            found = "a file, not a folder" if path.exists() else "no such folder"
            raise CheckpointNotFoundError(
                f"{str(self.name)!r}: {found}. Pass a folder that holds config.json and weights, "
                "or a hub id like 'openai/whisper-tiny'."
            )
        return None

    def find(self, filename: str) -> Path | None:
        """The local path of `filename`, downloaded if need be; None when the checkpoint has no such file.

        Raises:
            CheckpointNotFoundError: The repository or revision does not exist, or it cannot be reached.
        """
        folder = self.folder
        if folder is not None:
            settle(folder)
            path = folder / filename
            return path if path.is_file() else None
        # Imported here: it takes longer than reading a small model from a folder.
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(
                hf_hub_download(
                    str(self.name),
                    filename,
                    subfolder=self.subfolder or None,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    force_download=self.force_download,
                )
            )
        except errors.LocalEntryNotFoundError as error:
            if self._is_cached():
                return None
            raise CheckpointNotFoundError(
                f"{str(self.name)!r} is not a local folder, is not in the download cache, and the hub cannot be "
                f"reached ({'local_files_only=True' if self.local_files_only else 'offline'}). Check the spelling "
                f"and the connection, or pass a local folder.{self._owner_hint()}"
            ) from error
        except (
            errors.RepositoryNotFoundError,
            errors.RevisionNotFoundError,
            errors.GatedRepoError,
            errors.HFValidationError,
        ) as error:
            raise CheckpointNotFoundError(
                f"{str(self.name)!r} (revision {self.revision or 'main'}) cannot be read from the hub: it is neither a "
                "local folder nor a repository open to you. Check the spelling; a private or gated one needs token=."
                f"{self._owner_hint()}"
            ) from error
        except errors.EntryNotFoundError:
            return None
        except Exception as error:
            # Besides its own errors and those of the system it lets those of the library for HTTP through.
            from_http = type(error).__module__.startswith(("httpx", "requests"))
            if not (from_http or isinstance(error, errors.OfflineModeIsEnabled | OSError)):
                raise
            raise CheckpointNotFoundError(
                f"{str(self.name)!r} is not a local folder, and {filename} could not be fetched from the hub: {error}. "
                "Try again: what has come is kept."
            ) from error

    def require(self, filename: str) -> Path:
        """Like `find`, but a missing file is an error.

        Raises:
            CheckpointNotFoundError: The checkpoint has no `filename`.
        """
        path = self.find(filename)
        if path is None:
            where = f"{self.name}/{self.subfolder}" if self.subfolder else str(self.name)
            if filename == "config.json" and self.find("adapter_config.json") is not None:
                raise CheckpointNotFoundError(
                    f"{where!r} holds an adapter and no model: load the model it was made for, then "
                    f"load_lora(model, {str(self.name)!r})."
                )
            raise CheckpointNotFoundError(f"{where!r} holds no {filename}; is it a model's folder or hub id?")
        return path

    def _owner_hint(self) -> str:
        return "" if "/" in str(self.name) else " A hub id begins with its owner, like 'openai/whisper-large-v3'."

    def _is_cached(self) -> bool:
        """True when the download cache holds this repository's config, so that a missing file is really absent."""
        from huggingface_hub import errors, hf_hub_download

        try:
            hf_hub_download(
                str(self.name),
                "config.json",
                subfolder=self.subfolder or None,
                revision=self.revision,
                cache_dir=self.cache_dir,
                local_files_only=True,
            )
        except errors.LocalEntryNotFoundError:
            return False
        return True


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: The file is not JSON, is nested absurdly deep, or holds something other than an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable JSON: {pointer_hint(path) or str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a JSON {type(content).__name__}, but an object {{...}} is needed.")
    return content


def pointer_hint(path: str | os.PathLike[str]) -> str:
    """What to do where git has left its pointer in the place of a large file; "" for any other file."""
    with open(path, "rb") as file:
        is_pointer = file.read(40).startswith(b"version https://git-lfs")
    hint = "it is a pointer of Git LFS to the file. Run `git lfs pull` in its folder, or download it."
    return hint if is_pointer else ""


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write an object as indented JSON, atomically."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder `path`, made if need be.

    Raises:
        SaveError: `path` is a file, or cannot be made.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise SaveError(f"cannot save to {path!r}: the path of a folder is needed.")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SaveError(f"cannot save to {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    return folder


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once the block has ended without an error.

    Raises:
        SaveError: The disk is full or the place cannot be written; what stood at `path` stays as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except OSError as error:
        raise SaveError(f"{target} could not be written ({error}); the file that stood there is unchanged.") from error
    finally:
        if temporary.exists():  # Not where the folder is a file, which unlink() would complain about instead.
            temporary.unlink(missing_ok=True)
