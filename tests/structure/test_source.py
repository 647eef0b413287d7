"""What no file of the package may hold: pickles, code from text, shells, reference libraries, paths of one machine."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

#: Libraries that are compared with in tests/parity and benchmarks, never used.
REFERENCES = {
    "transformers", "whisper", "openai_whisper", "faster_whisper", "ctranslate2", "keras_hub", "keras", "timm",
    "torchaudio", "librosa", "whisperx",
}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {"torch.load", "torch.save", "os.system", "os.popen", "numpy.load", "np.load"}
# (file, attribute) -> why it stands there all the same.
ALLOWED = {
    ("convert/torch_bin.py", "torch.load"): "audiomm convert reads the tensors of pickles, with weights_only=True",
}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|tmp|home|root|opt|mnt|Users|workspace)/")
LINES = 500

# file -> why it is longer than LINES.
LONG_FILES: dict[str, str] = {}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(tree: ast.Module) -> list[str]:
    """Line and name of everything in one file that may not be there."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        unwanted = [name for name in names if name.split(".")[0] in REFERENCES | FORBIDDEN_MODULES]
        found += [f"line {node.lineno}: imports {name}" for name in unwanted]
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                found.append(f"line {node.lineno}: calls {node.func.id}()")
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle") and getattr(keyword.value, "value", True) is not False:
                    found.append(f"line {node.lineno}: {keyword.arg} is not False")
                if keyword.arg == "weights_only" and getattr(keyword.value, "value", False) is not True:
                    found.append(f"line {node.lineno}: weights_only is not True")
        if isinstance(node, ast.Attribute) and dotted(node) in FORBIDDEN_ATTRIBUTES:
            found.append(f"line {node.lineno}: uses {dotted(node)}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MACHINE_PATH.search(node.value):
            found.append(f"line {node.lineno}: holds the path of a machine, {node.value[:60]!r}")
    return found


def test_no_file_runs_code_from_data_or_leans_on_a_reference_library(source_trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{path}: {text}"
        for path, tree in source_trees.items()
        for text in findings(tree)
        if (path, text.split(" uses ")[-1]) not in ALLOWED
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from transformers import X",
        "import transformers.models.whisper",
        "eval('1')",
        "def f():\n    exec('x')",
        "torch.load(path)",
        "read(path, weights_only=False)",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
        "numpy.load(file, allow_pickle=flag)",
        "PATH = '/home/someone/model'",
    ],
)
def test_the_search_finds_what_it_looks_for(code: str) -> None:
    assert findings(ast.parse(code))


def test_the_search_lets_harmless_lines_pass() -> None:
    code = "model.eval()\nre.compile('x')\nsubprocess.run(['ls'], shell=False)\nURL = 'https://host/home/page'"
    assert findings(ast.parse(code)) == []


def test_every_file_with_code_begins_by_saying_what_it_is_for(source_trees: dict[str, ast.Module]) -> None:
    silent = [path for path, tree in source_trees.items() if tree.body and not ast.get_docstring(tree)]
    assert not silent, f"no module docstring: {silent}"


def test_every_file_delays_its_annotations(source_trees: dict[str, ast.Module]) -> None:
    """Python 3.10 reads newer annotations only then."""
    missing = []
    for path, tree in source_trees.items():
        futures = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.AnnAssign)
        annotated = any(isinstance(node, kinds) for node in ast.walk(tree))
        if annotated and not any(alias.name == "annotations" for node in futures for alias in node.names):
            missing.append(path)
    assert not missing, f"no 'from __future__ import annotations': {missing}"


def test_no_file_is_too_long_to_read_in_one_sitting(source_root: Path, source_trees: dict[str, ast.Module]) -> None:
    sizes = {path: len((source_root / path).read_text(encoding="utf-8").splitlines()) for path in source_trees}
    long = {path: size for path, size in sizes.items() if size > LINES and path not in LONG_FILES}
    assert not long, f"more than {LINES} lines: {long}"
    assert not [path for path in LONG_FILES if sizes.get(path, 0) <= LINES], "a reason in LONG_FILES is stale"


def test_marks_of_unfinished_work_are_gone(source_root: Path, source_trees: dict[str, ast.Module]) -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in source_trees
        for number, line in enumerate((source_root / path).read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_error_is_swallowed(source_trees: dict[str, ast.Module]) -> None:
    """A bare except, or one whose body is only `pass`."""
    found = [
        f"{path}:{node.lineno}"
        for path, tree in source_trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(line, ast.Pass) for line in node.body))
    ]
    assert not found, f"errors are swallowed at {found}"
