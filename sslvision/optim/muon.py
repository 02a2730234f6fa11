"""Muon for the weights of linear layers, AdamW for all other parameters."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from sslvision.errors import UsageError
from sslvision.nn.shards import is_sharded

# Polynomials a x + b x^3 + c x^5, one per iteration, that drive singular values towards 1 (You Jiacheng 2025, as in timm).
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Muon(Optimizer):
    """Momentum, orthogonalized matrix by matrix: all directions of a layer are learned at one rate.

    The weight W (m, n) of a linear layer with gradient G is updated by

        M <- momentum M + (1 - momentum) G
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(m, n)) orthogonal(momentum M + (1 - momentum) G)

    where `orthogonal` sets all singular values to about 1. The factor makes an update as large as AdamW's, so that AdamW's
    learning rates and weight decay carry over. Queries, keys and values are three matrices. Matrices of one shape are
    multiplied together, on CPUs in fp32; timm's Muon takes one after another, in bf16 even on CPUs without bf16 units.

    Sources: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the factor: Liu et al. 2025 (arXiv:2502.16982),
    section 2.2.

    Args:
        params: Parameter groups. Those with `"parts"` have weights that each consist of so many matrices, one below the other,
            and get Muon; all others get AdamW. See `split_matrices`.
        lr: Learning rate.
        weight_decay: Weight decay, which the learning rate multiplies.
        momentum: Of Muon.
        betas, eps: Of AdamW.

    Attributes:
        found_inf: A scalar on the device that is 1 if the next step shall change nothing, as of torch's fused optimizers.

    Raises:
        UsageError: momentum is out of range, or a weight is not a whole matrix, as under FSDP.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        if not 0 <= momentum < 1:
            raise UsageError(f"{momentum=} of optimizer=muon must be at least 0 and less than 1, such as 0.95.")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "parts": 0})
        for group in self.param_groups:
            if group["parts"] and any(is_sharded(p) or p.ndim != 2 for p in group["params"]):
                raise UsageError(
                    "optimizer=muon needs whole matrices, and these are shards or no matrices: use trainer.strategy=ddp, or "
                    "optimizer=adamw."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                (self._muon if group["parts"] else self._adamw)(group, weights)
        return loss

    def _muon(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        parts, momentum, rate = group["parts"], group["momentum"], group["lr"]
        gradients = gradients_of(weights)
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        average = [self.state[weight]["momentum"] for weight in weights]
        if self.found_inf is not None:  # a gradient that equals the momentum leaves it unchanged
            rate = rate * (1 - self.found_inf)
            pairs = zip(average, gradients, strict=True)
            gradients = [torch.where(self.found_inf > 0, old, gradient) for old, gradient in pairs]
        torch._foreach_lerp_(average, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, average, momentum)
        matrices = orthogonal([matrix for update in nesterov for matrix in update.chunk(parts)])
        updates = [torch.cat(matrices[i : i + parts]) for i in range(0, len(matrices), parts)]
        torch._foreach_mul_(updates, [0.2 * max(len(matrix) / parts, matrix.shape[1]) ** 0.5 for matrix in updates])
        torch._foreach_mul_(updates, -rate)
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        torch._foreach_add_(weights, updates)

    def _adamw(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        for weight in weights:
            if not self.state[weight]:
                averages = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                self.state[weight] = {"step": torch.zeros((), device=weight.device), **averages}
        states = [self.state[weight] for weight in weights]
        adamw(
            weights,
            gradients_of(weights),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{key: group[key] for key in ("lr", "weight_decay", "eps")},
        )


def gradients_of(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of weights that have one."""
    return [weight.grad for weight in weights if weight.grad is not None]


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return U V' of each matrix U S V' (m, n), approximately: by five Newton-Schulz iterations, in bf16 on CUDA."""
    of_shape: dict[torch.Size, list[int]] = defaultdict(list)
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T for matrix in matrices]
    for index, matrix in enumerate(wide):
        of_shape[matrix.shape].append(index)
    for indices in of_shape.values():
        x = torch.stack([wide[index] for index in indices])  # (N, m, n), m <= n
        x = x.to(torch.bfloat16 if x.device.type == "cuda" else x.dtype)
        x = x / (1.02 * x.norm(dim=(1, 2), keepdim=True)).clamp(min=1e-7)  # singular values up to 1, with a margin
        for a, b, c in COEFFICIENTS:
            square = x @ x.mT  # (N, m, m)
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
        for index, result in zip(indices, x.to(matrices[0].dtype).unbind(), strict=True):
            wide[index] = result
    return [result if m.shape[0] <= m.shape[1] else result.T for m, result in zip(matrices, wide, strict=True)]


def split_matrices(groups: Sequence[dict[str, Any]], module: nn.Module) -> list[dict[str, Any]]:
    """Split parameter groups into those that Muon updates and others.

    Args:
        groups: Parameter groups.
        module: The module whose linear layers count, but for a timm model's classifier, which AdamW suits better.

    Returns:
        The groups with their keys, in the same order: each as one of weights, one of weights of three matrices (queries, keys,
        values), and one of other parameters, where there are any.
    """
    find: Any = getattr(module, "get_classifier", lambda: None)
    classifier = find()
    parts = {
        layer.weight: 3 if name.rpartition(".")[2] == "qkv" else 1
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer is not classifier
    }
    return [
        {**group, "params": chosen, "parts": count}
        for group in groups
        for count in (1, 3, 0)
        if (chosen := [parameter for parameter in group["params"] if parts.get(parameter, 0) == count])
    ]
