"""The theoretical receptive field: the pixels that an output position can depend on, by arithmetic.

A layer with kernel F and stride S whose output window of W2 positions is wanted reads W1 = (W2 - 1) S + F positions of its
input, which is W2 = (W1 - F + 2P) / S + 1 read backwards, for a window inside the map. From W2 = 1 at the output back to the
image this gives the receptive field. Branches are merged to the range that any of them reads (Araujo, Norris and Sim 2019,
doi:10.23915/distill.00021).

A copy of the network runs on torch's meta device, and every operation carries the range that one of its positions reads
forward: the same numbers, without knowing beforehand how layers are connected. Operations that read all positions (global
pooling as in squeeze-and-excitation, attention over the whole map) make it the whole image. What is neither a window nor
pointwise nor global, such as attention in windows, has no such range. The range of convolutions and poolings alone is carried
on behind both, as its center remains that of the position.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sslvision.inspection.cost import running_modules

PREFIX = 5  # class and register tokens, at most, beside the positions of a map
aten = torch.ops.aten
POOLS = (aten.max_pool2d_with_indices, aten.avg_pool2d)
PADS = (aten.constant_pad_nd, aten.reflection_pad2d, aten.replication_pad2d)
PRODUCTS = (aten.mm, aten.addmm)
BATCHED = (aten.bmm, aten.baddbmm, aten._scaled_dot_product_flash_attention_for_cpu)
REDUCTIONS = (aten.mean, aten.sum, aten.amax, aten.var_mean)
# Nothing moves between positions: normalization by stored statistics, joined channels, and other views of the same numbers.
SAME = (
    *(aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.cat, aten.clone, aten.copy_),
    *(aten.view, aten._unsafe_view, aten.permute, aten.transpose, aten.t, aten.expand, aten.unsqueeze, aten.squeeze),
    *(aten.alias, aten.detach, aten._to_copy, aten._reshape_alias, aten.native_dropout, aten.lift_fresh),
)
PARTS = (aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.chunk)


class Span(NamedTuple):
    """What a position of a map reads along one axis: pixels jump * position + low to jump * position + high."""

    low: int
    high: int
    jump: int

    def window(self, kernel: int, stride: int, padding: int, dilation: int) -> "Span":
        """Return the span behind a convolution or pooling."""
        low = self.low - padding * self.jump
        return Span(low, self.high + ((kernel - 1) * dilation - padding) * self.jump, self.jump * stride)

    def shifted(self, before: int) -> "Span":
        """Return the span behind padding by so many positions."""
        return Span(self.low - before * self.jump, self.high - before * self.jump, self.jump)

    @property
    def size(self) -> int:
        """Return the number of pixels."""
        return self.high - self.low + 1

    def center(self, position: int) -> float:
        """Return the center in pixels of what a position reads."""
        return position * self.jump + (self.low + self.high) / 2


class Reads(NamedTuple):
    """What every position of a map reads."""

    spans: tuple[Span, Span] | None  # vertical and horizontal, by convolutions and poolings alone; None if not known
    positions: int  # of the map
    whole: bool = False  # whether it is the whole image
    why: str = ""  # why it is the whole image, or not known; "" if it is what the spans say

    @property
    def size(self) -> tuple[int, int] | None:
        """Return height and width in pixels; None for the whole image, or if it is not known."""
        return None if self.why or self.spans is None else (self.spans[0].size, self.spans[1].size)


class Window(NamedTuple):
    """A convolution or pooling in the order of execution, with the receptive field behind it."""

    module: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    map_size: tuple[int, int]  # rows and columns of its output
    field: tuple[int, int] | None  # pixels, vertical and horizontal; None: whole image, or not known
    whole: bool


class ReceptiveField(NamedTuple):
    """The theoretical receptive field of a position of the last feature map.

    Attributes:
        size: Height and width in pixels, which may exceed the image; None for the whole image, or if it is not known.
        whole: Whether a position reads the whole image.
        why: Why it is the whole image, or not known, in words.
        windows: Convolutions and poolings.
        spans: What a position reads along both axes by convolutions and poolings alone, if that is known.
        positions: Number of positions of the map that spans are of.
    """

    size: tuple[int, int] | None
    whole: bool
    why: str
    windows: list[Window]
    spans: tuple[Span, Span] | None = None
    positions: int = 0

    def center(self, position: tuple[int, int], grid: tuple[int, int]) -> tuple[float, float] | None:
        """Return the center in pixels of what a position (row, column) of a map (rows, columns) reads; None if not known."""
        if self.spans is None or self.positions != math.prod(grid):
            return None
        vertical, horizontal = self.spans
        return vertical.center(position[0]), horizontal.center(position[1])


def receptive_field(model: nn.Module, shape: tuple[int, int, int]) -> ReceptiveField:
    """Return the theoretical receptive field of a network's last feature map.

    Args:
        model: A timm model, or any other network that maps images to a map of features.
        shape: Channels, height and width of the images.
    """
    with torch.device("meta"), torch.no_grad():
        copied, image = copy.deepcopy(model).eval().to("meta"), torch.empty(1, *shape)
        with running_modules(copied) as running, Tracing(running) as tracing:
            tracing.put(image, Reads((Span(0, 0, 1), Span(0, 0, 1)), shape[1] * shape[2]))
            found = tracing.of(_last_map(copied, image))
    if found is None:
        return ReceptiveField(None, False, "its output does not depend on the image by operations that are known", [])
    return ReceptiveField(found.size, found.whole, found.why, tracing.windows, found.spans, found.positions)


def _last_map(model: Any, image: Tensor) -> Tensor:
    """Return the last features before the head."""
    features = model.forward_features(image) if hasattr(model, "forward_features") else model(image)
    if isinstance(features, Tensor):
        return features
    found: Tensor = model.forward_intermediates(image, indices=1, intermediates_only=True)[-1]
    return found


class Tracing(TorchDispatchMode):
    """Run operations, and note for every storage what its positions read.

    Args:
        running: Names of the modules that are running, see `running_modules`.
    """

    def __init__(self, running: list[str]):
        super().__init__()
        self._running = running
        self._reads: dict[int, tuple[Any, Reads]] = {}  # by the id of a storage, which is held
        self.windows: list[Window] = []

    def put(self, tensor: Tensor, reads: Reads) -> None:
        """Note what a tensor reads."""
        self._reads[id(tensor.untyped_storage())] = (tensor.untyped_storage(), reads)

    def of(self, tensor: Any) -> Reads | None:
        """Return what a tensor reads; None if it does not depend on the image."""
        found = self._reads.get(id(tensor.untyped_storage())) if isinstance(tensor, Tensor) else None
        return None if found is None else found[1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and note what its results read."""
        given = [self.of(one) for one in _tensors((*args, *(kwargs or {}).values()))]
        output = func(*args, **(kwargs or {}))
        inputs = [one for one in given if one is not None]
        for one in _tensors([output]):
            if inputs:
                self.put(one, self._behind(func, args, inputs, one))
        return output

    def _behind(self, func: Any, args: tuple[Any, ...], inputs: list[Reads], output: Tensor) -> Reads:
        """Return what a result of an operation reads."""
        packet, first = func.overloadpacket, inputs[0]
        if packet == aten.convolution and not args[6] and args[1].ndim == 4:
            return self._slid(first, args[0], output, [*args[1].shape[2:]], *args[3:6])
        if packet in POOLS:
            return self._slid(first, args[0], output, *_pooling(packet, args))
        if (whole := next((one for one in inputs if one.whole), None)) is not None:
            # The rows of a product are those of its first factor (queries); a gate of one position is spread over the map.
            at = first if packet in BATCHED else max(inputs, key=lambda one: one.positions)
            return at._replace(whole=True, why=whole.why)
        if packet in PADS and any(args[1]):
            return _padded(func, args[1], first, output)
        if packet in PRODUCTS:
            return _multiplied(func, args[1 if packet == aten.addmm else 0], inputs)
        if packet in BATCHED:
            whole_map = any(_reads_all(one, self.of(one)) for one in args if isinstance(one, Tensor))
            return (
                first._replace(whole=True, why="attention over the whole map") if whole_map else _unknown(func, first)
            )
        if packet in REDUCTIONS:
            return _reduced(func, args, first)
        if packet == aten._adaptive_avg_pool2d:
            return _pooled() if output.shape[-2:].numel() == 1 else _unknown(func, first)
        if packet == aten.native_group_norm:
            return first._replace(whole=True, why="normalization by the statistics of the whole map")
        if packet == aten.native_layer_norm:
            rows = args[0].numel() // torch.Size(args[1]).numel()
            return _merged(inputs) if rows in _tokens(first) else _unknown(func, first)
        if packet in PARTS:
            every = packet != aten.slice or len(args) < 5 or args[4] == 1  # not every other row
            return first if every and output.numel() % first.positions == 0 else _unknown(func, first)
        if packet in SAME or packet in PADS or torch.Tag.pointwise in func.tags:
            return _merged(inputs)
        return _unknown(func, first)

    def _slid(
        self, reads: Reads, given: Tensor, output: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any
    ) -> Reads:
        """Return what the positions behind a convolution or pooling read, and note the layer."""
        kernel, stride, padding, dilation = (_pair(one) for one in (kernel, stride, padding, dilation))
        size, spans, why = (output.shape[-2], output.shape[-1]), None, reads.why
        if given.shape[-2:].numel() != reads.positions:  # pixels have become channels, or a map its windows
            why = why or "its positions are rearranged"
        elif reads.spans is not None:
            vertical, horizontal = (
                span.window(*values)
                for span, *values in zip(reads.spans, kernel, stride, padding, dilation, strict=True)
            )
            spans = (vertical, horizontal)
        behind = Reads(spans, size[0] * size[1], reads.whole, why)
        name = self._running[-1] if self._running else ""
        if not self.windows or self.windows[-1].module != name or output.dtype != torch.int64:
            self.windows.append(Window(name, _two(kernel), _two(stride), _two(padding), size, behind.size, reads.whole))
        return behind


def _merged(inputs: list[Reads]) -> Reads:
    """Return what is read by a result that reads all of its inputs at the same position."""
    positions, why = max(one.positions for one in inputs), next((one.why for one in inputs if one.why), "")
    known = [one.spans for one in inputs if one.spans is not None]
    if len(known) < len(inputs) or len({(one[0].jump, one[1].jump) for one in known}) > 1:
        return Reads(None, positions, why=why or "it joins maps of different strides")
    vertical, horizontal = (
        Span(min(one[axis].low for one in known), max(one[axis].high for one in known), known[0][axis].jump)
        for axis in (0, 1)
    )
    return Reads((vertical, horizontal), positions, why=why)


def _pooled() -> Reads:
    return Reads(None, 1, whole=True, why="pooling of the whole map")


def _unknown(func: Any, reads: Reads) -> Reads:
    """Return that nothing is known, and the first operation that made it so."""
    name = func.overloadpacket.__name__.strip("_")
    what = (
        "attention within parts of the map"
        if func.overloadpacket in BATCHED
        else f"an operation without a rule, {name}"
    )
    return reads._replace(why=reads.why or what)


def _reduced(func: Any, args: tuple[Any, ...], reads: Reads) -> Reads:
    """Return what is read behind a mean, sum, maximum or variance: of the channels, or of the positions."""
    sizes, given = args[0].shape, args[1] if len(args) > 1 else None
    axes = {axis % len(sizes) for axis in given or range(len(sizes))}
    removed = math.prod(sizes[axis] for axis in axes)
    for rows, columns in ((2, 3), (1, 2)):  # (1, C, H, W) and (1, H, W, C)
        if len(sizes) == 4 and sizes[rows] * sizes[columns] == reads.positions:
            common = axes & {rows, columns}
            return _pooled() if len(common) == 2 else _unknown(func, reads) if common else reads
    of_channels = axes == {2} and len(sizes) == 3 and sizes[1] in _tokens(reads)  # (1, N, C)
    if removed in _tokens(reads) and not of_channels:
        return _pooled()
    return reads if args[0].numel() // removed % reads.positions == 0 else _unknown(func, reads)


def _padded(func: Any, padding: list[int], reads: Reads, output: Tensor) -> Reads:
    """Return what is read behind padding of rows and columns."""
    if reads.spans is None or len(padding) > 4:
        return _unknown(func, reads)
    spans = (reads.spans[0].shifted(padding[2] if len(padding) == 4 else 0), reads.spans[1].shifted(padding[0]))
    return Reads(spans, output.shape[-2:].numel(), why=reads.why)


def _multiplied(func: Any, rows_by_channels: Tensor, inputs: list[Reads]) -> Reads:
    """Return what is read behind a linear layer: of the channels, or of the positions, as in a mixer."""
    (rows, channels), first = rows_by_channels.shape, inputs[0]
    if rows in _tokens(first):
        return _merged(inputs)
    if channels in _tokens(first):
        return first._replace(whole=True, why="a linear layer over all positions")
    return _unknown(func, first)._replace(spans=None, positions=rows)


def _reads_all(operand: Tensor, reads: Reads | None) -> bool:
    """Return whether an operand of attention has all positions of its map side by side."""
    return reads is not None and any(side in _tokens(reads) for side in operand.shape[-2:])


def _tokens(reads: Reads) -> range:
    """Return the numbers of tokens that all positions of a map can be, with class and register tokens."""
    return range(reads.positions, reads.positions + PREFIX + 1)


def _pooling(packet: Any, args: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
    """Return kernel, stride, padding and dilation of a pooling."""
    kernel, stride, padding = (
        args[1],
        args[2] if len(args) > 2 and args[2] else args[1],
        args[3] if len(args) > 3 else 0,
    )
    dilation = args[4] if packet == aten.max_pool2d_with_indices and len(args) > 4 else 1
    return kernel, stride, padding, dilation


def _pair(value: int | list[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _two(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among values and in lists of them."""
    found: list[Tensor] = []
    for one in values:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, list | tuple):
            found += _tensors(one)
    return found
