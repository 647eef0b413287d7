"""Mixture of experts: a router picks a few experts for every token, and grouped matrix products run only those.

Nothing on the way waits for the device: tokens are sorted by expert, and the boundaries between experts stay on it.
Source: the model card of Gemma 4 26B-A4B; grouped products after MegaBlocks, arXiv:2211.15841.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import fused
from .norm import RMSNorm, has_norm_kernel, quick_size
from .quick import product

#: Up to so many tokens the weights of their experts are gathered instead, where the experts of a token have no more
#: numbers than this: what is larger is better read in place than copied and read.
_FEW_TOKENS, _SMALL_EXPERTS = 4, 2**18

#: Up to so many tokens each reads its experts for itself, where there is a kernel for that: they have few in common.
_FEW_READERS = 16


class Router(nn.Module):
    """Scores the experts for every token; module and parameter names are the checkpoint's.

    Args:
        width: Size of a token.
        experts: Number of experts.
        active: Experts a token goes through.
        eps: Of the norm before the scores.
    """

    def __init__(self, width: int, experts: int, active: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps, scaled=False)
        self.proj = nn.Linear(width, experts, bias=False)
        self.scale = nn.Parameter(torch.ones(width))
        self.per_expert_scale = nn.Parameter(torch.ones(experts))
        self.active, self.factor = active, width**-0.5

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route (tokens, width).

        Returns:
            Probabilities of all experts (tokens, experts) float32; weights of the chosen ones (tokens, active)
            float32, which sum to one before each is multiplied by its expert's scale; and which these are (tokens,
            active) int64.
        """
        scores = self.proj(self.norm(hidden) * self.scale * self.factor)
        probabilities = functional.softmax(scores, dim=-1, dtype=torch.float32)
        best, chosen = probabilities.topk(self.active, dim=-1)
        weights = best / best.sum(dim=-1, keepdim=True) * self.per_expert_scale[chosen]
        return probabilities, weights, chosen


class Experts(nn.Module):
    """Gated feed-forward blocks in two 3-D tensors, laid out as in the checkpoint: gate first, then up.

    Args:
        count: Number of experts.
        width: Size of a token.
        hidden: Inner size of one expert.
    """

    def __init__(self, count: int, width: int, hidden: int) -> None:
        super().__init__()
        self.count = count
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, hidden))

    def forward(self, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts make of each token.

        Args:
            hidden: (tokens, width).
            weights, chosen: (tokens, active) as `Router` returns them.

        Returns:
            (tokens, width), same dtype.
        """
        can_group = _can_group(hidden, self.gate_up_proj, self.down_proj)
        is_small = chosen.shape[1] * self.gate_up_proj[0].numel() <= _SMALL_EXPERTS
        if len(hidden) <= _FEW_TOKENS and (is_small or not can_group):
            return self._gathered(hidden, weights, chosen)
        if can_group:
            return self._grouped(hidden, weights, chosen)
        return self.looped(hidden, weights, chosen)

    def waits(self, tokens: int) -> bool:
        """Whether a decode step of so many tokens makes the host wait for a GPU, which no capture allows."""
        weight = self.down_proj
        if not weight.is_cuda or (tokens <= _FEW_READERS and fused.has_kernels(weight)):
            return False
        if not _can_group(weight, self.gate_up_proj, weight):
            return tokens > _FEW_TOKENS
        # Elsewhere torch asks the device where the groups end.
        return torch.cuda.get_device_capability(weight.device)[0] not in (9, 10)

    def _gathered(self, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        tokens, active = chosen.shape
        flat = chosen.flatten()
        # All experts of a token side by side are one matrix.
        first = self.gate_up_proj.index_select(0, flat).view(tokens, -1, hidden.shape[1])
        inner = gated(torch.bmm(first, hidden[..., None]).view(len(flat), -1))
        made = torch.bmm(self.down_proj.index_select(0, flat), inner[..., None])
        return torch.bmm(weights[:, None].to(made.dtype), made.view(tokens, active, -1)).view(hidden.shape)

    def _grouped(self, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        tokens, active = chosen.shape
        experts, order = chosen.flatten().sort(stable=True)
        every = torch.arange(self.count, device=experts.device)
        ends = torch.searchsorted(experts, every, right=True, out_int32=True)
        sorted_tokens = hidden.repeat(active, 1) if tokens == 1 else hidden[order // active]
        inner = gated(functional.grouped_mm(sorted_tokens, self.gate_up_proj.transpose(1, 2), offs=ends))
        made = functional.grouped_mm(inner, self.down_proj.transpose(1, 2), offs=ends)
        weights = weights.to(made.dtype)
        # A sum in a fixed order is the same from run to run, an index_add is not.
        if tokens == 1:
            return weights[:, order] @ made
        # Back into the order of the tokens.
        made = made[order.argsort()].unflatten(0, (-1, active))
        return torch.bmm(weights[:, None], made)[:, 0]

    def looped(self, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """`forward` said plainly, one expert after the other: where torch has no grouped product for the case."""
        total = torch.zeros_like(hidden, dtype=torch.float32)
        for expert in range(self.count):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            inner = gated(functional.linear(hidden[tokens], self.gate_up_proj[expert]))
            made = functional.linear(inner, self.down_proj[expert])
            total.index_add_(0, tokens, (made * weights[tokens, places, None]).to(total.dtype))
        return total.to(hidden.dtype)


def gated(gate_up: Tensor) -> Tensor:
    """Gate and up side by side (..., 2 x hidden) to what goes down (..., hidden)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def _can_group(hidden: Tensor, *weights: Tensor) -> bool:
    """Whether torch's grouped product takes these: from torch 2.10 on, on CUDA rows of whole 16 bytes in bfloat16."""
    if not hasattr(functional, "grouped_mm") or hidden.dtype == torch.float64:
        return False
    if hidden.device.type != "cuda":
        return True
    whole = all(weight.shape[-1] * weight.element_size() % 16 == 0 for weight in weights)
    return whole and hidden.dtype == torch.bfloat16 and torch.cuda.get_device_capability(hidden.device) >= (8, 0)


def quick_routing(router: Router) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The router for decode steps: normed and scaled tokens (tokens, width) to weights and choice (tokens, active).

    The softmax of the best scores is what the softmax of all scores gives the best, brought to a sum of one.
    """
    project, scales, active = product(router.proj), router.per_expert_scale.detach(), router.active
    softmax, multiply = torch.softmax, torch.mul

    def route(normed: Tensor) -> tuple[Tensor, Tensor]:
        best, chosen = project(normed).topk(active)
        # Worked out in float32, and written in the type that experts ask for.
        return multiply(softmax(best, -1, dtype=torch.float32), scales[chosen], out=best), chosen

    return route


def quick_experts(experts: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`Experts.forward` for decode steps: on a GPU few tokens read the weights of their experts where they lie."""
    if type(experts) is not Experts or not fused.has_kernels(experts.down_proj):
        return experts.forward
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()

    def run(hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        if len(hidden) > _FEW_READERS or torch.compiler.is_compiling():
            return experts.forward(hidden, weights, chosen)
        return fused.expert_sum(fused.expert_gates(hidden, gate_up, chosen), down, weights, chosen)

    return run


def quick_norms(weights: Tensor, eps: float) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Several RMSNorms of the same tokens at once: (tokens, width) to one such tensor a row of weights (n, width)."""
    weights = weights.detach()[:, None]
    width = weights.shape[-1]
    if has_norm_kernel(weights.device):
        shape, rms_norm = (width,), functional.rms_norm
        return lambda hidden: (rms_norm(hidden, shape, None, eps) * weights).unbind(0)
    size_of, scales = quick_size(width, eps), weights.float() * width**0.5

    def spelled_out(hidden: Tensor) -> tuple[Tensor, ...]:
        return (hidden * scales).div_(size_of(hidden)).to(hidden.dtype).unbind(0)

    return spelled_out
