"""torch.compile of blocks and losses, in training only: fewer kernels and less memory traffic.

Shapes are static. Blocks of the same kind share a graph, because their weights are its inputs. Everything that is not training
(online evaluation, pictures, validation) runs eagerly, so a smaller last batch compiles nothing. benchmarks/RESULTS.md has the
speed-up on an H100.
"""

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

BACKEND = "inductor"
# Graphs of one function: a ViT block has at most six (two crop sizes, the teacher, each with and without drop-path), a Swin
# block as many for each stage and shift.
MAX_GRAPHS = 64


def should_compile(setting: bool | None, device: torch.device) -> bool:
    """Return whether to compile: by default on CUDA with Triton. On a CPU compilation takes minutes and gains nothing."""
    return setting if setting is not None else device.type == "cuda" and importlib.util.find_spec("triton") is not None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, to be compiled on its first call."""
    return torch.compile(function, **_options())


def compile_module(module: nn.Module) -> None:
    """Compile a module on its first call. Parameter names do not change."""
    module.compile(**_options())


def _options() -> dict[str, Any]:
    options: dict[str, Any] = {"backend": BACKEND, "dynamic": False}
    torch._dynamo.config.optimize_ddp = False  # it would split blocks at DDP's buckets
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {**options, "recompile_limit": MAX_GRAPHS}
    torch._dynamo.config.recompile_limit = MAX_GRAPHS  # torch 2.11 has one limit for the process
    return options


@contextmanager
def force_eager() -> Iterator[None]:
    """Run compiled functions and modules eagerly while the context is active."""
    with torch.compiler.set_stance("force_eager"):
        yield


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382) with its rate in a tensor.

    In timm it is a Python number that differs between blocks, so each block would get its own graph.
    """

    kept: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.register_buffer("kept", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Zero random rows of x (B, ...) and scale the others so that the mean is kept."""
        if not self.training:
            return x
        kept = self.kept.to(x.dtype)
        shape = (len(x), *(1,) * (x.ndim - 1))
        return x * (torch.rand(shape, dtype=x.dtype, device=x.device) < kept) / kept


def share_graphs(model: nn.Module) -> None:
    """Let blocks that differ only in their drop-path rate share a graph."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            rate: Any = getattr(child, "drop_prob", 0)
            if type(child) is timm.layers.DropPath and 0 < rate < 1 and child.scale_by_keep:
                setattr(module, name, DropPath(rate).to(next(model.parameters()).device).train(child.training))
