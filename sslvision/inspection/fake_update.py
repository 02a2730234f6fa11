"""The memory of an update, found without it: a method's step on fake tensors, which have shapes, dtypes and a device, no data.

The real code runs: losses, autograd's graph, recomputed activations, casts of autocast, the optimizer. Each operation only
makes tensors of the right size, whose bytes are followed from when they are made until the last one on a storage is gone.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
import torch.cuda.amp.common
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.swin import Swin
from sslvision.data.batch import Batch
from sslvision.errors import SSLVisionError, UsageError
from sslvision.inspection.fake_backward import run_backward
from sslvision.inspection.peak_memory import LiveTensors
from sslvision.methods.base import Clock, Method

CLOCK = Clock(
    step=500, steps=1000, steps_per_epoch=10
)  # in mid-training: nothing is frozen, as it may be in the first epochs
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StepBytes:
    """Most bytes alive at once in a step of so many images, besides weights, buffers, and the optimizer's state.

    Attributes:
        images: Images of the batch.
        inputs: Crops as they come from the loader, and the views made of them.
        forward: In the forward pass: inputs, activations, and weights in another dtype.
        backward: In the backward pass: the same as far as it is left, and the gradients so far.
        activations: In the backward pass without the gradients of parameters.
    """

    images: int
    inputs: int
    forward: int
    backward: int
    activations: int


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes of an optimizer.

    Attributes:
        state: Of each trained parameter by name: its state's tensors that have its shape, and other ones.
        temporary: Most bytes in an update besides state and gradients.
        unknown: Why temporary tensors are not known; an empty string if they are.
    """

    state: dict[str, tuple[int, int]]
    temporary: int
    unknown: str = ""


@dataclass(frozen=True)
class Inputs:
    """Shapes and dtypes of crops and views; the sizes that grow with the batch are given for two and for four images."""

    crops: list[tuple[int, ...]]
    views: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]

    def make(self, images: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
        """Return crops and views of so many images."""
        crops = [torch.empty(images, *shape, dtype=torch.uint8, device=device) for shape in self.crops]
        views = []
        for two, four, dtype in self.views:
            shape = [a + (b - a) * (images - 2) // 2 for a, b in zip(two, four, strict=True)]
            views.append(torch.empty(shape, dtype=dtype, device=device))
        return crops, views


def inputs_of(method: Method) -> Inputs:
    """Return the inputs of a step: the method makes views of two and of four black images, on the CPU.

    Raises:
        UsageError: It cannot do so while its weights are on the meta device.
    """
    channels, found = len(method.normalize.mean.flatten()), []
    _replace(method.normalize, lambda tensor: torch.full(tensor.shape, 0.5, dtype=tensor.dtype, device="cpu"))
    for images in (2, 4):
        crops = [torch.zeros(images, channels, *crop.shape, dtype=torch.uint8) for crop in method.crops]
        index = torch.arange(images)
        batch = Batch(crops, index, torch.zeros_like(index), [], index)
        with torch.no_grad(), _in_words(method, "views"):
            found.append(method.views(batch, ImageRandom(0, batch.epoch, index)))
    _replace(method.normalize, _module_to("meta"))
    views = [(tuple(a.shape), tuple(b.shape), a.dtype) for a, b in zip(*found, strict=True)]
    return Inputs([tuple(one.shape[1:]) for one in crops], views)


def measure_step(
    method: Method, inputs: Inputs, images: int, *, device: str, autocast: torch.dtype | None
) -> StepBytes:
    """Run the forward and the backward pass of a step.

    Args:
        method: A method on torch's meta device, in train mode; it is left so.
        inputs: Its inputs.
        images: Images of the batch.
        device: Type of the device: "cpu" or "cuda", which need not be there.
        autocast: dtype of autocast; None for none.

    Raises:
        UsageError: The method cannot be run so.
    """
    with _fake(method, device) as live:
        crops, given = inputs.make(images, device)
        taken = live.peak = live.bytes
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = method.losses(given, CLOCK)["loss"]
            losses = [loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)]
        del loss, given
        forward, live.peak = live.peak, live.bytes
        tracked = _Gradients(live)
        run_backward(losses, tracked.add)
        del crops
    return StepBytes(images, taken, forward, live.peak, tracked.peak)


def measure_optimizer(method: Method, *, device: str) -> OptimizerBytes:
    """Run two updates of the method's optimizer, of which the first makes its state. See `measure_step`."""
    with _fake(method, device) as live:
        trained = {name: one for name, one in method.named_parameters() if one.requires_grad}
        for one in trained.values():
            one.grad = torch.empty_like(one)
        optimizer, unknown, temporary = method.optimizer(), "", 0
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        for _ in range(2):
            before = live.peak = live.bytes
            try:
                method.prepare_update(optimizer, CLOCK)
                optimizer.step()
                method.after_update(CLOCK)
            except (RuntimeError, NotImplementedError, TypeError) as error:  # it looks at a number on the device
                unknown = (
                    f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
                )
                break
            temporary = live.peak - max(before, live.bytes)
        state = {}
        for name, one in trained.items():
            tensors = [value for value in optimizer.state[one].values() if isinstance(value, Tensor)]
            like = sum(value.nbytes for value in tensors if value.shape == one.shape)
            state[name] = (like, sum(value.nbytes for value in tensors) - like)
            one.grad = None
        del optimizer
    return OptimizerBytes(state, temporary, unknown)


class _Gradients:
    """Follow the peak of memory without the gradients of parameters."""

    def __init__(self, live: LiveTensors):
        self.live, self.bytes, self.peak = live, 0, 0
        live.made = self.note

    def note(self) -> None:
        self.peak = max(self.peak, self.live.bytes - self.bytes)

    def add(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.bytes += parameter.grad.untyped_storage().nbytes()


@contextmanager
def _fake(method: Method, device: str) -> Iterator[LiveTensors]:
    """Put a method on fake tensors of a device, follow their memory, and put it back on the meta device."""
    _clear_caches()
    with ExitStack() as stack:
        stack.callback(_clear_caches)
        for patch in _patches():
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.callback(_replace, method, _module_to("meta"))
        _replace(method, _module_to(device))
        for part in method.modules():
            if isinstance(part, Swin):
                part.counts_windows = False  # the largest number: without data, there is nothing to count
        own = [*method.parameters(), *method.buffers()]
        if device == "cuda":
            stack.enter_context(_FusedAttention())
        live = stack.enter_context(LiveTensors(own))
        with _in_words(method, "losses"):
            yield live


@contextmanager
def _in_words(method: Method, what: str) -> Iterator[None]:
    try:
        yield
    except SSLVisionError:
        raise
    except Exception as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"dry_run=plan cannot follow {what} of {type(method).__name__} without data: {told}. It depends on the values of "
            "pixels or weights: measure with dry_run=true on the device itself."
        ) from error


def _fake_like(tensor: Tensor, device: str) -> Tensor:
    """Return a new fake tensor with the shape, strides and dtype of a tensor of the meta device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _module_to(device: str) -> Callable[[Tensor], Tensor]:
    if device == "meta":
        return lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return lambda tensor: _fake_like(tensor, device)


def _replace(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace parameters and buffers; those that are shared stay shared."""
    changed: dict[int, tuple[Tensor, Any]] = {}  # holds the old ones, so that none is freed and its id used again
    for part in module.modules():
        groups: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for own in groups:
            for name, one in own.items():
                if one is None:
                    continue
                if id(one) not in changed:
                    new = change(one)
                    is_parameter = isinstance(one, nn.Parameter)
                    new = nn.Parameter(new, requires_grad=one.requires_grad) if is_parameter else new
                    changed[id(one)] = one, new
                own[name] = changed[id(one)][1]


def _clear_caches() -> None:
    """Empty the caches of functions: what they keep would be fake for others, or real for fake ones."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sslvision.") and module is not None:
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _patches() -> list[Any]:
    """Return contexts in which torch takes CUDA for present, and recomputes activations without looking at random states."""
    generator = torch.utils.checkpoint._checkpoint_without_reentrant_generator

    def without_random_state(function: Any, preserve: Any = True, *rest: Any, **options: Any) -> Any:
        return generator(function, False, *rest, **options)

    return [
        _patched(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        _patched(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        _patched(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", without_random_state),
        _patched(torch._C, "_current_graph_task_id", lambda: 0),  # that of a backward pass: blocks are recomputed once
    ]


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def fused_attention(enabled: bool) -> Iterator[None]:
    """Build networks of timm with fused attention or without, as `configure_torch` does."""
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(enabled)
    try:
        yield
    finally:
        timm.layers.set_fused_attn(bool(before))


class _FusedAttention(TorchFunctionMode):
    """Attention by the kernels of a GPU, which torch does not choose where there is none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _attend(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (one.to(torch.get_autocast_dtype("cuda")) for one in (query, key, value))
    ops: Any = torch.ops.aten
    if attn_mask is None and query.dtype in HALF and query.shape[-1] <= 256:
        flash = ops._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
        return flash[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    efficient = ops._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
