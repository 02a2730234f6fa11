"""What a network costs: parameters, floating-point operations and activations kept for training, in all and by layer.

All functions return numbers by the name of a module, in which those of the modules inside it are included; "" is the whole.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters of every module; one that is used twice counts once."""
    return {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules()}


def count_flops(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, int]:
    """Return the floating-point operations of a forward pass of one image, by torch.utils.flop_counter.

    A multiplication and an addition are two. Counted are matrix products, convolutions and attention, as is usual;
    normalization, activation functions, pooling and additions are not. A forward and backward pass takes about three times
    as many. Nothing is computed: a copy of the network runs on torch's meta device.

    Args:
        model: The network.
        shape: Channels, height and width of the image.
    """
    with torch.device("meta"), torch.no_grad():
        copied, image = copy.deepcopy(model).eval().to("meta"), torch.empty(1, *shape)
        with FlopCounterMode(display=False) as counter:
            copied(image)
    root = type(model).__name__
    counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    found = {name.removeprefix(root).removeprefix("."): count for name, count in counts.items() if name != "Global"}
    return found | {"": counts.get("Global", 0)}


def count_saved_bytes(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Return the bytes that one forward pass in training mode keeps for the backward pass.

    Measured with torch.autograd.graph.saved_tensors_hooks. Each storage counts once, in full, for the module that saved it
    first; parameters and buffers, which are there anyway, do not count. The images do, if a layer keeps them. What is kept
    depends on the device: attention by one fused kernel keeps no attention weights, by two products it does.

    Args:
        model: The network. Its running statistics and mode change.
        images: (B, C, H, W), on the network's device.
    """
    own = [one.untyped_storage() for one in (*model.parameters(), *model.buffers())]
    anyway = {id(storage) for storage in own}
    kept: dict[int, Any] = {}  # holds the storages, as does `own`, so that none is freed and its id used again
    saved: Counter[str] = Counter({"": 0})

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in kept and id(storage) not in anyway:
            kept[id(storage)] = storage
            saved.update(dict.fromkeys({"", *running}, storage.nbytes()))
        return tensor

    model.train()
    with running_modules(model) as running, saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        model(images)
    return dict(saved)


@contextmanager
def running_modules(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that always has the names of the modules whose forward is running, the outermost first."""
    running: list[str] = []

    def enter(name: str) -> Any:
        return lambda module, inputs: running.append(name)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave, always_call=True)]
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()
