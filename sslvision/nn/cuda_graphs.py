"""A step's forward and backward pass as CUDA graphs: the host launches each as a whole, not kernel by kernel.

A step of MAE on ViT-B/16 is 1,400 kernels, one of DINO on ViT-S/16 2,000. Where a host needs 20 to 40 microseconds for each,
it takes longer than an H100 does, which then waits for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WARM_UP = 3  # steps before the capture: libraries choose their kernels and take their memory in the first ones
MODE = "thread_local"  # other threads, such as the one that pins the loader's batches, may go on meanwhile


class CapturedStep:
    """A function of tensors that returns a loss and other scalars, and its gradients, as two CUDA graphs.

    Shapes and whatever is not a tensor stay as they were at the capture; weights and buffers are read anew in each step. Random
    numbers follow the device's generator, seed included, as they do without a graph. Gradients lie in memory of the graphs:
    `backward` puts them into, or adds them to, `parameter.grad`.

    Args:
        function: of `inputs`; returns "loss" and others. Nothing in it may wait for the device.
        network: whose parameters get gradients. Buffers that steps change are left as they were.
        inputs: of the first step.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]], network: nn.Module, inputs: Sequence[Tensor]):
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.inputs = [torch.empty_like(one).copy_(one) for one in inputs]
        before = [(buffer, buffer.clone()) for buffer in network.buffers()]
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                found = self._gradients(function(*self.inputs)["loss"], None)
                self.parameters = [p for p, g in zip(self.parameters, found, strict=True) if g is not None]
        current.wait_stream(stream)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, capture_error_mode=MODE):
            self.outputs = function(*self.inputs)
        self._scale = torch.ones_like(self.outputs["loss"])
        with torch.cuda.graph(self._backward, pool=self._forward.pool(), capture_error_mode=MODE):
            self.gradients = self._gradients(self.outputs["loss"], self._scale)
        for buffer, value in before:
            buffer.copy_(value)

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Return whether these are of the captured shapes and types."""
        pairs = zip(self.inputs, inputs, strict=False)
        return len(inputs) == len(self.inputs) and all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return what the function does of inputs that fit."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._forward.replay()
        results = {name: value.detach() for name, value in self.outputs.items()}  # written over by the next step
        start = results["loss"].requires_grad_()  # a leaf for autograd to call `backward` by
        return results | {"loss": _Loss.apply(start, self)}

    def keep_gradients(self) -> None:
        """Take `parameter.grad` out of the graphs' memory, which a forward pass writes over: due where batches accumulate."""
        for parameter, own in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not None and parameter.grad is own:
                parameter.grad = own.clone()

    def backward(self, scale: Tensor) -> None:
        """Put gradients times `scale`, a scalar, into `parameter.grad`, or add them to what is there."""
        sums = [parameter.grad for parameter in self.parameters]
        assert sums[0] is not self.gradients[0], "zero_grad() or keep_gradients() comes first"
        self._scale.copy_(scale)
        self._backward.replay()
        before = [(total, own) for total, own in zip(sums, self.gradients, strict=True) if total is not None]
        if before:
            torch._foreach_add_(*map(list, zip(*before, strict=True)))
        for parameter, total, own in zip(self.parameters, sums, self.gradients, strict=True):
            parameter.grad = own if total is None else total

    def _gradients(self, loss: Tensor, scale: Tensor | None) -> list[Any]:
        """Return the gradient of each parameter, laid out as the parameter is: fused optimizers ask for that."""
        with torch.autocast(loss.device.type, enabled=False):  # as a backward pass is run
            found = torch.autograd.grad(loss, self.parameters, scale, allow_unused=True)
        return [
            g if g is None or g.stride() == p.stride() else torch.empty_like(p).copy_(g)
            for p, g in zip(self.parameters, found, strict=True)
        ]


class _Loss(torch.autograd.Function):
    """The loss, whose backward pass is that of the captured step."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, step: CapturedStep) -> Tensor:
        ctx.step = step
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.step.backward(gradient)
        return None, None
