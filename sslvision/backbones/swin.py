"""Swin transformers (Liu et al. 2021, arXiv:2103.14030): any timm `SwinTransformer`, which can encode visible units only."""

import math

from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.vit import init_transformer
from sslvision.errors import UsageError
from sslvision.nn.activation_checkpointing import run_checkpointed
from sslvision.nn.compilation import compile_module, compiled, share_graphs
from sslvision.nn.image_size import indivisible
from sslvision.nn.patches import gather_patches, patchify
from sslvision.nn.windows import (
    SafeWindowAttention,
    WindowPartition,
    Windows,
    all_windows,
    build_windows,
    window_attention,
)


class Swin(Backbone):
    """A timm Swin of any width, depth, number of stages, window, patch and image size.

    A unit is visible or hidden as a whole and becomes one output token: 32 x 32 pixels with four stages and patches of 4.
    Patch merging stays inside a unit. Visible units are therefore encoded as by the dense model with the hidden tokens
    removed from its attention, without computing anything for hidden tokens.

    Maps that windows do not divide get smaller windows at their borders, and windows larger than the map shrink to it, so
    images of other sizes work; stock timm pads such maps with zeros, which tokens then attend to.

    Raises:
        UsageError: The model is not a Swin of the first version, or the image size is not a multiple of a unit.
    """

    supports_masking = True
    block_functions = ("run_block",)

    # B images, L units, K of them visible, n tokens of a unit in a stage, C the stage's width, D the last one's, p patch side

    def __init__(self, model: SwinTransformer):
        super().__init__()
        if type(model) is not SwinTransformer:
            raise UsageError(
                f"A {type(model).__name__} is not a Swin transformer of the first version, and no other is supported: "
                "choose one, such as swin_tiny_patch4_window7_224 or swin_base_patch4_window7_224."
            )
        patch = model.patch_embed.patch_size
        if patch[0] != patch[1]:
            raise UsageError(
                f"Patches of {patch[0]}x{patch[1]} pixels are not supported: set backbone.patch_size to one number."
            )
        for module in model.modules():
            if type(module) is WindowAttention:
                refuse_ambiguous(*module.window_size)
                module.__class__ = SafeWindowAttention
        self.model = model
        self.levels = len(model.layers) - 1  # number of patch mergings
        self.image_size = model.patch_embed.img_size
        self.channels, self.embed_dim = model.patch_embed.proj.in_channels, model.num_features
        self.stride = patch[0] * 2**self.levels
        self.grid = self.units_of(*self.image_size)
        self.num_prefix = 0
        self.run_block, self.counts_windows = run_block, True

    def encode(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encode all units of images (B, C, H, W), of any size, or only the visible units `keep`. See Backbone.encode.

        If all images have the same visible units, pass `keep[:1].expand(B, -1)`: layouts are then computed for one image.

        Returns:
            (B, L or K, D); all units are in row-major order.

        Raises:
            UsageError: H or W is not a multiple of `stride`.
        """
        height, width = images.shape[2:]
        grid = self.units_of(height, width)
        if keep is None and (height, width) == tuple(self.image_size) and self.windows_divide:
            return self.model.forward_features(images).flatten(1, 2)  # (B, L, D)
        if keep is None:
            units = patchify(images, self.stride).unflatten(2, (-1, self.stride, self.stride))
        else:
            units = gather_patches(images, keep, self.stride)  # (B, K, channels, stride, stride)
        tokens = self._embed(units)  # (B, K * n, C)
        for level, stage in zip(range(self.levels, -1, -1), self.model.layers, strict=True):
            if not isinstance(stage.downsample, nn.Identity):
                merged = tokens.unflatten(1, (-1, 4)).flatten(2)  # (B, K * n, 4 * C of before)
                tokens = stage.downsample.reduction(stage.downsample.norm(merged))
            tokens = self._attend(stage, tokens, keep, grid, level)
        return self.model.norm(tokens)  # (B, K, D)

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the mean of the tokens (B, D), as timm's Swin does."""
        return tokens.mean(dim=1)

    @property
    def windows_divide(self) -> bool:
        """Return whether stock timm encodes images of `image_size` without padding."""
        return all(
            side % window == 0
            for stage in self.model.layers
            for block in stage.blocks
            for side, window in zip(stage.output_resolution, block.window_size, strict=True)
        )

    def units_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the number of rows and columns of units of an image with sides in pixels."""
        if wrong := indivisible((height, width), self.stride):
            raise UsageError(
                f"Images of {height}x{width} pixels cannot be divided into this Swin's units of {self.stride}x{self.stride}, "
                f"one output token each: give sides that are multiples of {self.stride} (backbone.image_size, local_size)"
                f"{wrong}."
            )
        return height // self.stride, width // self.stride

    def _embed(self, units: Tensor) -> Tensor:
        """Return the input of the first stage (B, K * n, C) for units' pixels (B, K, channels, stride, stride).

        Tokens of a unit are in `nested_order`: the bits of a token's index alternate between those of its row and its column.
        """
        embed, levels = self.model.patch_embed, self.levels
        p, halves = embed.patch_size[0], (2,) * levels
        pixels = units.unflatten(4, (*halves, p)).unflatten(
            3, (*halves, p)
        )  # (B, K, channels, 2, ..., 2, p, 2, ..., 2, p)
        row, column = 3, 4 + levels  # first axis of each
        turns = [axis for level in range(levels) for axis in (column + level, row + level)]
        pixels = pixels.permute(0, 1, *turns, 2, row + levels, column + levels)  # (B, K, 2, ..., 2, channels, p, p)
        patches = pixels.flatten(2 + 2 * levels).flatten(1, 1 + 2 * levels)  # (B, K * n, channels * p * p)
        # A convolution with stride = kernel size is a matrix product.
        return embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))

    def _attend(
        self, stage: SwinTransformerStage, tokens: Tensor, keep: Tensor | None, grid: tuple[int, int], level: int
    ) -> Tensor:
        """Run the blocks of a stage on tokens (B, K * n, C), of units with sides of 2**level tokens."""
        unit, B = 2**level, len(tokens)
        if keep is not None and keep.stride(0) == 0:
            keep = keep[:1]
        windows: dict[WindowPartition, Windows] = {}  # blocks with and without a shift alternate
        for block in stage.blocks:
            partition = partition_of(block, (grid[0] * unit, grid[1] * unit))
            if partition not in windows and keep is None:
                windows[partition] = all_windows(B, unit, partition, tokens.device)
            elif partition not in windows and keep is not None:
                count = self.counts_windows and keep.device.type == "cpu"
                windows[partition] = build_windows(keep, unit, partition, B // len(keep), count=count)
            checkpointed = stage.grad_checkpointing and self.training
            tokens = run_checkpointed(self.run_block, block, tokens, windows[partition], enabled=checkpointed)
        return tokens

    def blocks(self) -> list[nn.Module]:
        """See Backbone.blocks."""
        return [block for stage in self.model.layers for block in stage.blocks]

    def compile_blocks(self) -> None:
        """See Backbone.compile_blocks. Shapes have to be static, so non-empty windows are not counted."""
        share_graphs(self.model)
        for stage in self.model.layers:
            for block in stage.blocks:
                compile_module(block)
        self.run_block, self.counts_windows = compiled(run_block), False

    def init_weights(self) -> None:
        """Initialize as MAE's encoder (He et al. 2021, appendix A.1): Xavier-uniform matrices, attention biases near 0."""
        init_transformer(self.model)
        nn.init.xavier_uniform_(self.model.patch_embed.proj.weight.flatten(1))
        for stage in self.model.layers:
            for block in stage.blocks:
                nn.init.normal_(block.attn.relative_position_bias_table, std=0.02)


def refuse_ambiguous(rows: int, columns: int) -> None:
    """Raise UsageError for windows whose table of biases timm takes for that of a square window when it loads weights."""
    length = (2 * rows - 1) * (2 * columns - 1)
    if rows != columns and math.isqrt(length) ** 2 == length:
        raise UsageError(
            f"For this image_size a stage of this Swin has windows of {rows}x{columns} tokens. Their bias table has {length} "
            "entries, like that of a square window, which timm takes it for when it loads weights: set another "
            "backbone.image_size, or a smaller backbone.window_size."
        )


def partition_of(block: SwinTransformerBlock, size: tuple[int, int]) -> WindowPartition:
    """Return how a block partitions a map of rows and columns `size`: as timm does if timm would not pad."""
    table = block.attn.window_size
    if block.always_partition:
        return WindowPartition(size, block.window_size, block.shift_size, table)
    (h, w), shifted = block.window_size, any(block.target_shift_size)
    shift = (h // 2 if shifted and size[0] > h else 0, w // 2 if shifted and size[1] > w else 0)
    return WindowPartition(size, (min(h, size[0]), min(w, size[1])), shift, table)


def run_block(block: SwinTransformerBlock, tokens: Tensor, windows: Windows) -> Tensor:
    """Run a timm Swin block on tokens (B, N, C) that are laid out by `windows`."""
    tokens = tokens + block.drop_path1(window_attention(block.attn, block.norm1(tokens), windows))
    return tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
