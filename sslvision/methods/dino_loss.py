"""The cross-entropies between a teacher's answers to some crops and a student's to all others."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def cross_entropy_of_pairs(q: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean cross-entropy H(q_t, softmax(logits_s / temperature)) over t and s != t (DINO, Eq. 3), without any pair of its own.

    With z = logits / temperature, and as q sums to 1, H(q, softmax(z)) = logsumexp(z) - q.z, which is linear in q and z but
    for the first term: all pairs are the sum of the q's against the sum of the z's, less the same-view ones.

    Args:
        q: (2, B, K), the teacher's distributions of the global crops.
        logits: (S, B, K), the student's; crops 0 and 1 are the teacher's.
        temperature: of the student.
    """
    loss: Tensor = _Pairs.apply(q, logits, temperature)
    return loss


class _Pairs(torch.autograd.Function):
    """The gradient of z_s is softmax(z_s) for each of its pairs, less their q's: few passes over (S, B, K)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, logits: Tensor, temperature: float) -> Tensor:
        S, B, _ = logits.shape
        z = logits / temperature  # (S, B, K)
        p = z.softmax(dim=-1)  # (S, B, K)
        logsumexp = z.amax(dim=-1) - p.amax(dim=-1).log()  # (S, B), for log p = z - logsumexp
        ctx.save_for_backward(q, p)
        ctx.pairs, ctx.temperature = B * (2 * S - 2), temperature
        everything = 2 * logsumexp.sum() - (q.sum(dim=0) * z.sum(dim=0)).sum()
        same_view = logsumexp[:2].sum() - (q * z[:2]).sum()
        return (everything - same_view) / ctx.pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        q, p = ctx.saved_tensors
        one = gradient / (ctx.pairs * ctx.temperature)
        of_logits = p * (2 * one)  # (S, B, K)
        of_logits[:2] /= 2
        of_logits -= q.sum(dim=0) * one
        of_logits[:2] += q * one
        return None, of_logits, None
