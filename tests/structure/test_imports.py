"""What importing the package, and asking its command for help, loads: nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

#: Loaded only when a name that needs them is first used.
HEAVY = ("torch", "numpy", "tokenizers", "huggingface_hub", "safetensors", "accelerate", "PIL", "av", "soundfile",
         "soxr", "jinja2", "tqdm")  # fmt: skip


def modules_after(code: str) -> dict[str, Any]:
    """Run `code` in a fresh interpreter; its exit code and the top-level modules it had loaded at the end."""
    program = (
        "import json, sys\nstatus = 0\ntry:\n"
        + "".join(f"    {line}\n" for line in code.splitlines())
        + "except SystemExit as stop:\n    status = stop.code or 0\n"
        + "print('\\n' + json.dumps({'status': status, 'modules': sorted({m.split('.')[0] for m in sys.modules})}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return {"text": done.stdout, **json.loads(done.stdout.splitlines()[-1])}


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = modules_after("import audiomm\nassert audiomm.__version__")["modules"]
    assert "audiomm" in loaded
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["transcribe", "--help"]])
def test_help_and_version_load_no_torch(arguments: list[str]) -> None:
    found = modules_after(f"from audiomm.cli.main import main\nstatus = main({arguments!r})")
    assert found["status"] == 0
    assert "audiomm" in found["text"]
    assert not {"torch", "numpy", "tokenizers", "safetensors", "accelerate"} & set(found["modules"])


def test_the_configuration_of_a_model_needs_no_tokenizer_and_no_audio_library() -> None:
    loaded = set(modules_after("from audiomm.base.config import PreTrainedConfig\nPreTrainedConfig()")["modules"])
    assert not {"tokenizers", "soundfile", "soxr", "jinja2", "accelerate", "av", "PIL"} & loaded


def test_using_all_public_names_never_loads_optional_libraries() -> None:
    code = "import audiomm\nfor name in audiomm.__all__: getattr(audiomm, name)"
    # The compiler of torch takes seconds to import.
    found = modules_after(f"{code}\nstatus = int('torch._dynamo' in sys.modules)")
    loaded = set(found["modules"])
    assert found["status"] == 0
    assert "torch" in loaded
    assert not {"transformers", "PIL", "av", "tensorflow", "jax", "flax"} & loaded


def test_the_first_text_of_a_folder_needs_no_hub_no_dispatcher_and_no_templates() -> None:
    """They take as long to import as a small model takes to load."""
    code = """import audiomm
recognise = audiomm.pipeline("automatic-speech-recognition", model="audiomm/whisper-commands")
sound = {"raw": [0.0] * 1600, "sampling_rate": 16000}
assert isinstance(recognise(sound, generate_kwargs={"max_new_tokens": 2})["text"], str)"""
    loaded = set(modules_after(code)["modules"])
    assert {"torch", "tokenizers", "safetensors"} <= loaded
    assert not {"huggingface_hub", "accelerate", "jinja2", "PIL", "av"} & loaded
