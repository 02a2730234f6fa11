"""How many bytes a device holds and sends in a training on n of them, by one process, DDP or FSDP2: arithmetic, nothing is run.

What a step needs besides weights comes from fake_update.py. Gradients of the update before are held in the forward pass: the
Trainer frees them between it and the backward pass.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from sslvision.backbones.backbone import Backbone
from sslvision.inspection.fake_update import OptimizerBytes, StepBytes
from sslvision.methods.base import Method

Strategy = Literal["one process", "ddp", "fsdp2"]
CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers whose weights autocast casts


@dataclass(frozen=True)
class DeviceMemory:
    """What one device holds.

    Attributes:
        held: Bytes that are there in the whole run, by what they are.
        gradients: Bytes of gradients between updates.
        in_forward, in_backward: Bytes of gathered weights and gradients in either pass.
        temporary: Bytes of the optimizer's temporary tensors.
        kept: Whether gradients are there from the beginning of the backward pass on: those of the micro-batch before.
        steps: Two steps with different numbers of images, between and beyond which bytes are linear.
        sent: Bytes that a device sends in an update, by what they are.
    """

    held: Mapping[str, int]
    gradients: int
    in_forward: int
    in_backward: int
    temporary: int
    kept: bool
    steps: tuple[StepBytes, StepBytes]
    sent: Mapping[str, int]

    def step(self, images: int) -> StepBytes:
        """Return the bytes of a step of so many images."""
        one, other = self.steps
        share = (images - one.images) / (other.images - one.images)
        of = {
            name: (getattr(one, name), getattr(other, name))
            for name in ("inputs", "forward", "backward", "activations")
        }
        return StepBytes(images, **{name: round(a + share * (b - a)) for name, (a, b) in of.items()})

    def peak(self, images: int) -> int:
        """Return the most bytes at once with batches of so many images."""
        return sum(self.held.values()) + max(self._phases(images))

    def _phases(self, images: int) -> tuple[int, int, int]:
        """Return the most bytes in forward pass, backward pass and update, besides what is held in the whole run."""
        step = self.step(images)
        return (
            self.gradients + self.in_forward + step.forward,
            self.in_backward + (self.gradients + step.activations if self.kept else step.backward),
            self.gradients + self.temporary,
        )

    def rows(self, images: int) -> dict[str, int]:
        """Return what the peak consists of."""
        known = {**self.held, "gradients": self.gradients}
        phases = self._phases(images)
        gathered = (self.in_forward, self.in_backward, 0)[phases.index(max(phases))]
        known |= {"gathered weights and gradients": gathered} if self.in_forward else {}
        rest = self.peak(images) - sum(known.values())
        inputs = min(rest, self.step(images).inputs)
        return {**known, "images: crops and views": inputs, "activations and temporary tensors": rest - inputs}

    def largest_batch(self, memory: float) -> int:
        """Return the most images of a batch that fit; 0 if not one does."""
        fits, beyond = 0, 1
        while self.peak(beyond) <= memory:
            fits, beyond = beyond, 2 * beyond
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            fits, beyond = (middle, beyond) if self.peak(middle) <= memory else (fits, middle)
        return fits


def memory_of(
    method: Method,
    strategy: Strategy,
    devices: int,
    *,
    accumulate: int,
    steps: tuple[StepBytes, StepBytes],
    optimizer: OptimizerBytes,
    low: bool,
) -> DeviceMemory:
    """Return what each of n devices holds.

    Args:
        method: The method, on any device.
        strategy: How it is distributed.
        devices: n.
        accumulate: Batches per update.
        steps: Of the method.
        optimizer: Of the method.
        low: Whether autocast multiplies in 16 bits, in which fsdp2 gathers blocks: they are not cast then.
    """
    n = devices if strategy == "fsdp2" else 1
    trained = {name: one for name, one in method.named_parameters() if one.requires_grad}
    gradients = shards(trained.values(), n)
    held = {f"weights, {name}": shards(of, n) for name, of in parts_of(method).items()}
    held["buffers"] = buffers = sum(one.nbytes for one in method.buffers())
    state = 0
    for name, (like, rest) in optimizer.state.items():
        one = trained[name]
        state += round(like * shards([one], n) / max(1, one.nbytes)) + rest
    held["state of the optimizer"] = state
    common: dict[str, Any] = {"gradients": gradients, "temporary": optimizer.temporary // n, "steps": steps}
    if strategy != "fsdp2":
        sent: dict[str, int] = {}
        if strategy == "ddp":
            held["buckets of gradients for DDP"] = gradients
            sent = {"all-reduce of gradients": round(2 * (devices - 1) / devices * gradients)}
            sent["buffers"] = buffers
        return DeviceMemory(held=held, in_forward=0, in_backward=0, kept=accumulate > 1, sent=sent, **common)
    groups = gathered_groups(method, 2 if low else None)
    if low:
        recomputed = any(isinstance(one, Backbone) and one.activation_checkpointing for one in method.modules())
        cast = bytes_cast(method)
        common["steps"] = tuple(without(step, cast, in_backward=not recomputed) for step in steps)
    root, blocks = groups[0], groups[1:]
    largest = max((of.weights(n) for of in blocks), default=0)
    of_gradients = max((of.gradients + of.reduced(n) for of in blocks), default=0)
    passed = (devices - 1) / devices
    sent = {
        # The root's weights stay from forward to backward pass; those of blocks are gathered twice, if they are trained.
        "all-gather of weights": round(passed * accumulate * sum(of.weights(n) * of.times for of in groups)),
        "reduce-scatter of gradients": round(passed * accumulate * sum(of.reduced(n) for of in groups)),
    }
    return DeviceMemory(
        held=held,
        # One block, and the buffer that another one arrives in; in the backward pass also the gradients of the one, and those
        # of the block before it, which are being reduced.
        in_forward=root.weights(n) + 2 * largest,
        in_backward=root.weights(n) + root.gradients + 2 * largest + of_gradients,
        kept=True,
        sent=sent,
        **common,
    )


@dataclass(frozen=True)
class Group:
    """Parameters that fsdp2 gathers together.

    Attributes:
        parameters: Them.
        size: Bytes of a gathered number; None for each parameter's own.
        times: How often they are gathered in a step.
    """

    parameters: Sequence[Tensor]
    size: int | None
    times: int

    def weights(self, n: int) -> int:
        """Return the bytes of the gathered weights of n shards, padded."""
        return sum(n * _rows(one, n) * (self.size or one.element_size()) for one in self.parameters)

    @property
    def gradients(self) -> int:
        """Return the bytes of their gradients before they are reduced."""
        return sum(one.numel() * (self.size or one.element_size()) for one in self.parameters if one.requires_grad)

    def reduced(self, n: int) -> int:
        """Return the bytes of their gradients while they are reduced, in fp32."""
        return sum(n * _rows(one, n) * max(4, one.element_size()) for one in self.parameters if one.requires_grad)


def gathered_groups(method: Method, size: int | None) -> list[Group]:
    """Return the group of all parameters that are gathered for the whole step, then a group for each block."""
    taken: set[int] = set()
    blocks = []
    for block in method.sharded_modules():
        own = [one for one in block.parameters() if id(one) not in taken]
        taken |= {id(one) for one in own}
        times = 2 if any(one.requires_grad for one in own) else 1
        blocks.append(Group(own, None if getattr(block, "gathered_in_fp32", False) else size, times))
    return [Group([one for one in method.parameters() if id(one) not in taken], None, 1), *blocks]


def bytes_cast(method: Method) -> int:
    """Return the bytes of the copies in 16 bits that autocast keeps of the weights of blocks in the forward pass."""
    blocks = [block for block in method.sharded_modules() if not getattr(block, "gathered_in_fp32", False)]
    layers = {id(layer): layer for block in blocks for layer in block.modules() if isinstance(layer, CAST)}
    own = [one for layer in layers.values() for one in layer.parameters(recurse=False) if one.requires_grad]
    return sum(2 * one.numel() for one in own)


def without(step: StepBytes, cast: int, *, in_backward: bool) -> StepBytes:
    """Return the bytes of a step without the copies of weights, which the backward pass has if it recomputes nothing."""
    kept = cast if in_backward else 0
    return replace(
        step, forward=step.forward - cast, backward=step.backward - kept, activations=step.activations - kept
    )


def parts_of(method: Method) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of trained backbones, other trained ones, and those that are not trained, as a teacher's."""
    in_backbones = {id(one) for part in method.modules() if isinstance(part, Backbone) for one in part.parameters()}
    trained = [one for one in method.parameters() if one.requires_grad]
    return {
        "trained backbone": [one for one in trained if id(one) in in_backbones],
        "trained decoder or head": [one for one in trained if id(one) not in in_backbones],
        "not trained (EMA teacher)": [one for one in method.parameters() if not one.requires_grad],
    }


def shards(tensors: Iterable[Tensor], n: int) -> int:
    """Return the bytes of the shard that the first of n devices has: of each tensor a share of its rows, rounded up."""
    return sum(_rows(one, n) * one.element_size() for one in tensors)


def _rows(tensor: Tensor, n: int) -> int:
    """Return the numbers of the first of n shards."""
    if tensor.ndim == 0 or n == 1:
        return tensor.numel()
    return math.ceil(tensor.shape[0] / n) * (tensor.numel() // max(1, tensor.shape[0]))
