"""Tensors and modules in shards over several processes: torch's FSDP2 (`fully_shard`, torch.distributed.tensor).

A block's weights are gathered when its forward begins and freed when it ends. Functions that use a block's weights without
calling its forward therefore run inside its method `run`, see `through_block`.
"""

from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")  # without importing torch.distributed.tensor, which is slow


def local_shards(tensors: Iterable[Any]) -> list[Tensor]:
    """Return the parts of tensors that this process has, which share their memory; others as they are."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def whole_tensor(tensor: Any) -> Any:
    """Return the whole tensor. All processes have to call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, like: Any) -> Tensor:
    """Return a whole tensor in shards as `like` is; each process cuts its own one."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed = tensor.to(like.device, like.dtype)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def norms_of(tensors: Sequence[Any]) -> Sequence[Tensor]:
    """Return the norm of each tensor as a whole: scalars. All processes have to call this for tensors in shards."""
    norms = torch._foreach_norm(local_shards(tensors))
    if not tensors or not is_sharded(tensors[0]):
        return norms
    squares = torch.stack([*norms]).square()
    dist.all_reduce(squares, group=tensors[0].device_mesh.get_group())
    return squares.sqrt().unbind()


def shard_module(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: Any,
    *,
    forwards: Sequence[str] = (),
    compute: torch.dtype | None = None,
) -> None:
    """Shard blocks, and what else the root has, over a mesh of processes, after all have got the weights of the first.

    Args:
        root: The module; its other parameters are one group.
        blocks: Modules whose weights are gathered one module at a time.
        mesh: One-dimensional.
        forwards: Names of the root's methods that use its weights.
        compute: dtype in which weights of blocks are gathered and multiplied; gradients are reduced in fp32. None, and
            for blocks with `gathered_in_fp32`: their own.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    broadcast(root, torch.device(mesh.device_type))
    low = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for block in blocks:
        block.unsharded_class = type(block)  # type: ignore[assignment]  # `fully_shard` changes the class
        full = compute is None or getattr(block, "gathered_in_fp32", False)
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy() if full else low)
        block.run = MethodType(_run, block)  # type: ignore[assignment]
        register_fsdp_forward_method(block, "run")
    root.unsharded_class = type(root)  # type: ignore[assignment]
    fully_shard(root, mesh=mesh)
    for name in forwards:
        register_fsdp_forward_method(root, name)


def _run(block: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    return function(block, *inputs)


def through_block(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function(block, ...)`, run while the block's weights are gathered."""

    def call(block: Any, *inputs: Any) -> Any:
        return block.run(function, *inputs)

    return call


@torch.no_grad()
def broadcast(module: nn.Module, device: torch.device) -> None:
    """Give all processes the weights and buffers of the first, as DDP does."""
    for tensor in [*module.parameters(), *module.buffers()]:
        there = tensor.to(device)
        dist.broadcast(there, src=0)
        tensor.copy_(there)
