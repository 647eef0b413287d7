"""The GPU's kernels beside what they stand for: run by Triton's interpreter, compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from audiomm.layers import fused
from audiomm.models.gemma3n import streams

CPU = torch.device("cpu")
OPERATIONS = ["norm_added", "gelu_times", "strong_gelu_times", "turned", "attended", "expert_gates",
              "expert_sum", "predicted", "gathered", "corrected"]  # fmt: skip


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    pytest.importorskip("triton")
    done = interpreted(Path(__file__).with_name("kernels_beside_twins.py"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def interpreted(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: the interpreter of kernels is chosen when Triton is imported."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_decode_step_of_kernels_gives_the_logits_of_the_modules():
    pytest.importorskip("triton")
    file = Path(__file__).parents[1] / "models" / "test_gemma_quick_step.py"
    name = "as_built_for_a_gpu and True-True"
    done = interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", name, file)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kernel_gives_what_its_twin_gives(differences, operation, dtype):
    assert differences[f"{operation}, {dtype}"] <= 1.0


def broken(values: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("ptxas fatal: no such target")


class OnDevice:
    """An operation that differs the second time it is called: on the device, by so much."""

    def __init__(self, difference: float) -> None:
        self.difference, self.calls = difference, 0

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return values + self.difference * (self.calls - 1)


@pytest.mark.parametrize(
    ("operation", "agrees", "message"),
    [
        (OnDevice(1e-6), True, ""),
        (OnDevice(0.5), False, "gave other numbers"),
        (broken, False, "no such target"),
    ],
)
def test_a_device_goes_without_kernels_that_fail_or_give_other_numbers(caplog, operation, agrees, message):
    assert fused.agree(CPU, iter([(operation, (torch.randn(3, 4),))])) is agrees
    assert message in caplog.text
    assert bool(caplog.text) is not agrees


def test_what_an_operation_writes_over_is_not_what_its_twin_reads():
    values = torch.ones(2, 3)
    assert fused.agree(CPU, iter([(torch.Tensor.add_, (values, 1.0))]))
    assert torch.equal(values, torch.full((2, 3), 2.0))


def test_without_a_gpu_there_are_none_and_they_can_be_turned_off(monkeypatch):
    assert not fused.has_kernels(torch.ones(1))
    assert not streams.has_kernels(torch.ones(1))
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert fused.can_run_kernels(on_gpu)
    assert not fused.can_run_kernels(SimpleNamespace(device=torch.device("cuda"), dtype=torch.int8))
    monkeypatch.setenv("AUDIOMM_KERNELS", "0")
    assert not fused.can_run_kernels(on_gpu)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_defaults_of_the_caller_do_not_reach_what_kernels_are_tried_with(default):
    torch.set_default_dtype(default)
    torch.set_default_device("meta")
    try:
        trials = [*fused._trials(CPU, torch.float32), *streams._trials(CPU, torch.float32)]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    tensors = [one for _, arguments in trials for one in arguments if isinstance(one, torch.Tensor)]
    assert {one.device for one in tensors} == {CPU}
    assert {one.dtype for one in tensors} == {torch.float32, torch.int64}


FLOAT, STATE, INT = "*bf16", "*fp32", "i32"
#: Kernel -> the types of its tensors and numbers, its constants at the sizes of published models, and its warps.
SIGNATURES = {
    "_norm_added": ([FLOAT] * 4 + [INT] * 2 + ["fp32"] * 2, {"HAS_SCALAR": True, "BLOCK": 8192}, 16),
    "_gelu_times": ([FLOAT] * 3 + [INT] * 3, {"BLOCK": 1024}, 4),
    "_strong_gelu_times": ([FLOAT] * 3 + [INT] * 3 + ["fp32"], {"BLOCK": 16384}, 16),
    "_turned": ([FLOAT] * 4 + [INT] * 7 + ["fp32"], {"BLOCK": 256}, 1),
    "_attended": (
        [FLOAT] * 4 + [STATE] * 2 + [INT] * 8,
        {"EACH": 8, "WIDTH": 512, "QUERIES": 16, "COLUMNS": 512, "SLOTS": 16, "PRECISION": "tf32"}, 4,
    ),
    "_joined": ([STATE] * 2 + [FLOAT, INT], {"EACH": 8, "WIDTH": 512, "COLUMNS": 512}, 4),
    "_expert_gates": ([FLOAT] * 2 + ["*i64", FLOAT] + [INT] * 3, {"OUTPUTS": 8, "INPUTS": 256}, 4),
    "_expert_sum": ([FLOAT] * 3 + ["*i64", FLOAT] + [INT] * 3, {"OUTPUTS": 8, "INPUTS": 256}, 4),
    "_predicted": (
        [STATE] * 4 + [FLOAT, STATE, FLOAT, INT, INT, "fp32"], {"STREAMS": 4, "ROWS": 4, "BLOCK": 2048}, 8,
    ),
    "_gathered": ([STATE] + [FLOAT] * 4 + [STATE, FLOAT, INT] + ["fp32"] * 2, {"BLOCK": 2048}, 8),
    "_corrected": (
        [STATE] * 2 + [FLOAT] + [STATE] * 3 + [FLOAT] * 2 + [STATE, FLOAT, INT, INT, "fp32"],
        {"STREAMS": 4, "ROWS": 4, "COLUMNS": 8, "BLOCK": 2048}, 8,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what the next Triton will do otherwise
@pytest.mark.parametrize("kernel", SIGNATURES)
@pytest.mark.parametrize("capability", [80, 90])
def test_a_kernel_compiles_for_gpus_at_the_sizes_of_published_models(kernel, capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from audiomm.layers import kernels
    from audiomm.models.gemma3n import kernels as stream_kernels

    function = getattr(kernels if hasattr(kernels, kernel) else stream_kernels, kernel)
    types, constants, warps = SIGNATURES[kernel]
    given = iter(types)
    signature = {name: "constexpr" if name in constants else next(given) for name in function.arg_names}
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=places),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 1},
    )
    assert compiled.metadata.shared <= 99 * 1024
    assert compiled.asm["cubin"]


def test_every_operation_is_tried_before_its_kernel_is_trusted():
    trials = (*fused._trials(CPU, torch.float32), *streams._trials(CPU, torch.float32))
    tried = {getattr(operation, "func", operation).__name__ for operation, _ in trials}
    assert tried == set(OPERATIONS)
