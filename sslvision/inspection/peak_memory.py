"""The most memory that a training step of a network takes."""

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = (
    "most bytes allocated by torch's CUDA allocator (torch.cuda.max_memory_allocated) after a pass that is not measured, less "
    "what other tensors and cuBLAS held"
)
ELSEWHERE = "most bytes of tensors alive at once, by their storages; what a kernel allocates for itself is not seen"


def peak_memory(model: nn.Module, images: Tensor) -> int:
    """Return the most bytes in use at once during a forward and backward pass in training mode, without an optimizer.

    That is parameters, buffers, images, activations, gradients and temporary results. On CUDA it is the allocator's peak;
    elsewhere the peak of the bytes of all tensors alive, followed at every operation: the same on every machine and in every
    process, but without the memory that the program and its libraries take and what kernels allocate inside.

    Args:
        model: The network, without gradients. Its running statistics and mode change.
        images: (B, C, H, W), on the network's device.
    """
    model.train()
    own = [*model.parameters(), *model.buffers(), images]
    storages = {id(one.untyped_storage()): one.untyped_storage() for one in own}
    held = sum(storage.nbytes() for storage in storages.values())
    try:
        if images.device.type == "cuda":
            _pass(model, images)  # cuBLAS takes its workspace, and cuDNN tries its algorithms, in the first one only
            model.zero_grad(set_to_none=True)
            before = torch.cuda.memory_allocated(images.device)
            torch.cuda.reset_peak_memory_stats(images.device)
            _pass(model, images)
            return held + torch.cuda.max_memory_allocated(images.device) - before
        with LiveTensors(own) as live:
            _pass(model, images)
        return held + live.peak
    finally:
        model.zero_grad(set_to_none=True)


def _pass(model: nn.Module, images: Tensor) -> None:
    model(images).sum().backward()


class LiveTensors(TorchDispatchMode):
    """Follow the bytes of tensors that operations make, from when they are made until the last tensor on a storage is gone.

    Args:
        known: Tensors that were there before, which do not count.

    Attributes:
        bytes: Bytes alive now.
        peak: Most bytes that were alive at once.
        made: Called after each tensor that was made.
    """

    made: Callable[[], None] | None = None

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.bytes = self.peak = 0
        self._known = [one.untyped_storage() for one in known]  # held, so that their ids stay theirs
        self._ids = {id(storage) for storage in self._known}
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and note the storages of its results."""
        output = func(*args, **(kwargs or {}))
        for one in output if isinstance(output, list | tuple) else itertools.repeat(output, 1):
            if isinstance(one, Tensor):
                self._note(one.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._ids or key in self._alive:
            return

        def gone(_: Any) -> None:
            self.bytes -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        if self.made is not None:
            self.made()
