"""Blocks and losses compiled by torch.compile: fewer kernels and less memory traffic, in training alone.

Shapes are static. Blocks of one kind share a graph, for their weights are its inputs. What is not training (features on the
way, pictures, validation) runs as it stands, so an odd last batch compiles nothing. What it
gains on an H100 stands in benchmarks/RESULTS.md.
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
# Graphs of one function: a ViT's block has six at most (both sizes of crops, the teacher, each with and without drop-path), a
# Swin's as many for each stage and shift.
MOST_GRAPHS = 64


def wanted(setting: bool | None, device: torch.device) -> bool:
    """Return whether to compile: if not said, where there are CUDA and Triton. On a CPU it takes minutes and gains nothing."""
    return setting if setting is not None else device.type == "cuda" and importlib.util.find_spec("triton") is not None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is compiled when it is first called."""
    return torch.compile(function, **_options())


def compile_module(module: nn.Module) -> None:
    """Have a module compiled when it is first called. Names of parameters stay as they are."""
    module.compile(**_options())


def _options() -> dict[str, Any]:
    options: dict[str, Any] = {"backend": BACKEND, "dynamic": False}
    torch._dynamo.config.optimize_ddp = False  # DDP's buckets would cut blocks to pieces
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {**options, "recompile_limit": MOST_GRAPHS}
    torch._dynamo.config.recompile_limit = MOST_GRAPHS  # torch 2.11 has one for the whole process
    return options


@contextmanager
def eagerly() -> Iterator[None]:
    """Run what is compiled as it stands, for as long as the context lasts."""
    with torch.compiler.set_stance("force_eager"):
        yield


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382) whose rate is a tensor.

    timm's is a number, different in every block, and each would have a graph of its own.
    """

    kept: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.register_buffer("kept", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, ...), or zeros, for each of its rows; the others are scaled so that the mean stays."""
        if not self.training:
            return x
        kept = self.kept.to(x.dtype)
        shape = (len(x), *(1,) * (x.ndim - 1))
        return x * (torch.rand(shape, dtype=x.dtype, device=x.device) < kept) / kept


def share_graphs(model: nn.Module) -> None:
    """Let blocks that differ only in their rate of drop-path share a graph."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            rate: Any = getattr(child, "drop_prob", 0)
            if type(child) is timm.layers.DropPath and 0 < rate < 1 and child.scale_by_keep:
                setattr(module, name, DropPath(rate).to(next(model.parameters()).device).train(child.training))
