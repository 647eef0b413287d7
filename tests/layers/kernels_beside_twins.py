"""Run by test_kernels.py under Triton's interpreter.

Prints {operation: largest difference from its twin, in units of what is allowed} as JSON; and as much as infinity
where one makes a number of what is none, and the other does not.
"""

from __future__ import annotations

import json
import math
from functools import partial

import torch

from audiomm.layers import fused, kernels
from audiomm.models.gemma3n import kernels as stream_kernels
from audiomm.models.gemma3n import streams

CPU = torch.device("cpu")
found: dict[str, float] = {}
trials = [trial for dtype in fused._TOLERANCES for part in (fused, streams) for trial in part._trials(CPU, dtype)]
for operation, arguments in trials:
    plain, options = getattr(operation, "func", operation), getattr(operation, "keywords", {})
    name = plain.__name__
    kernel = getattr(kernels if hasattr(kernels, name) else stream_kernels, name)
    spoilt = [fused._on_cpu(argument) for argument in arguments]
    spoilt[0].view(-1)[0] = torch.nan
    numbers = [fused._tensors(run(*map(fused._on_cpu, spoilt))) for run in (operation, partial(kernel, **options))]
    are_alike = all(torch.equal(one.isnan(), other.isnan()) for one, other in zip(*numbers, strict=True))
    expected = fused._tensors(operation(*map(fused._on_cpu, arguments)))
    made = fused._tensors(kernel(*arguments, **options))
    dtype = expected[-1].dtype
    for one, other in zip(expected, made, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        relative, absolute = fused._TOLERANCES[one.dtype]
        allowed = absolute + relative * one.float().abs()
        worst = float(((one.float() - other.float()).abs() / allowed).max())
        label = f"{name}, {str(dtype)[6:]}"
        found[label] = max(found.get(label, 0.0), worst if are_alike else math.inf)
print(json.dumps(found))
