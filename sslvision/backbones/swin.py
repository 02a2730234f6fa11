"""Swin transformers (Liu et al. 2021, arXiv:2103.14030): any timm `SwinTransformer`, encoding visible units only if asked."""

import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sslvision.backbones.base import Backbone
from sslvision.backbones.vit import init_transformer
from sslvision.errors import UsageError
from sslvision.nn.patches import take_patches
from sslvision.nn.windows import Windows, cut_windows, nested_order, window_attention


class Swin(Backbone):
    """A timm Swin of any size, number of stages, window, patch and image size.

    A mask unit is an output token: 32 x 32 pixels with four stages of patches of 4. Patch merging stays inside a unit, so
    visible units are encoded as by the dense model from whose attention hidden tokens are removed.

    Images of another size than the model's, or a size that windows do not divide, are cut into windows without padding (see
    `nn.windows`), a window larger than the map is shrunk to it. timm pads such maps with zeros that tokens attend to.

    Raises:
        UsageError: the model is no Swin v1, or an image is not a multiple of a unit.
    """

    # B images, L units, K of them visible, n tokens of a unit in a stage, C its width, D the last stage's, p patch side

    def __init__(self, model: SwinTransformer):
        super().__init__()
        if type(model) is not SwinTransformer:
            raise UsageError(
                f"A {type(model).__name__} is not a Swin transformer of the first version, the only one that is supported: "
                "choose one, such as swin_tiny_patch4_window7_224."
            )
        embed = model.patch_embed
        self.model = model
        self.levels = len(model.layers) - 1  # of patch merging
        self.image_size = embed.img_size
        self.channels, self.width = model.in_chans, model.num_features
        self.stride = embed.patch_size[0] * 2**self.levels
        self.num_prefix = 0
        if embed.patch_size[0] != embed.patch_size[1]:
            raise UsageError(f"Patches of {embed.patch_size[0]}x{embed.patch_size[1]} pixels: give square ones.")
        self.grid = self._units(*self.image_size)
        self.windows_divide = all(
            side % window == 0
            for stage in model.layers
            for block in stage.blocks
            for side, window in zip(stage.output_resolution, block.window_size, strict=True)
        )

    def encode(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encode all units of images (B, C, H, W), whose size may differ from `image_size`, or the visible ones `keep` alone.

        See Backbone.encode. If all images have the same visible units, pass one row expanded: `keep[:1].expand(B, -1)`
        computes tables once.

        Raises:
            UsageError: H or W is not a multiple of `stride`.
        """
        height, width = images.shape[2:]
        grid = self._units(height, width)
        if keep is None and (height, width) == tuple(self.image_size) and self.windows_divide:
            return self.model.forward_features(images).flatten(1, 2)  # (B, L, D)
        if keep is None:
            keep = torch.arange(grid[0] * grid[1], device=images.device).expand(len(images), -1)
        tokens = self._embed(images, keep)  # (B, K * n, C)
        for level, stage in enumerate(self.model.layers):
            tokens = self._merge(stage.downsample, tokens)
            tokens = self._attend(stage, tokens, keep, grid, self.levels - level)
        return self.model.norm(tokens)  # (B, K, D)

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the mean of the tokens, as the timm model does."""
        return tokens.mean(dim=1)  # (B, D)

    def _units(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of units."""
        if height % self.stride or width % self.stride:
            raise UsageError(
                f"Images of {height}x{width} pixels cannot be cut into this Swin's units of {self.stride}x{self.stride}: "
                f"give sizes that are multiples of {self.stride}."
            )
        return height // self.stride, width // self.stride

    def _embed(self, images: Tensor, keep: Tensor) -> Tensor:
        """Return what the first stage sees of the visible units (B, K * n, C), each unit's tokens in `nested_order`."""
        embed = self.model.patch_embed
        pixels = take_patches(images, keep, self.stride)  # (B, K, channels, stride, stride)
        patch = embed.patch_size[0]
        patches = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # (B, K, channels, side, p, side, p)
        y, x = nested_order(self.levels, images.device)
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6)[:, :, y, x]  # (B, K, n, channels, p, p)
        # A convolution whose windows never overlap is a matrix product.
        return embed.norm(F.linear(patches.flatten(3).flatten(1, 2), embed.proj.weight.flatten(1), embed.proj.bias))

    @staticmethod
    def _merge(merging: nn.Module, tokens: Tensor) -> Tensor:
        """Merge four neighbours to one (B, N, C) -> (B, N / 4, 2C), except before the first stage."""
        if isinstance(merging, nn.Identity):
            return tokens
        B, N, C = tokens.shape
        return merging.reduction(merging.norm(tokens.view(B, N // 4, 4 * C)))

    def _attend(self, stage: nn.Module, tokens: Tensor, keep: Tensor, grid: tuple[int, int], level: int) -> Tensor:
        """Run a stage's blocks (B, K * n, C) on units of side 2**level."""
        windows: dict[tuple[int, int], Windows] = {}  # by shift: blocks alternate between two
        for block in stage.blocks:
            window, shift = self._window(block, (grid[0] << level, grid[1] << level))
            if shift not in windows:
                windows[shift] = self._windows(keep, grid, level, window, shift, block.attn.window_size)
            if stage.grad_checkpointing and self.training:
                tokens = checkpoint(run_block, block, tokens, windows[shift], use_reentrant=False)
            else:
                tokens = run_block(block, tokens, windows[shift])
        return tokens

    @staticmethod
    def _window(block: SwinTransformerBlock, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return window and shift of a block on a map of rows and columns."""
        (h, w), shifted = block.window_size, any(block.target_shift_size)
        if block.always_partition:
            return block.window_size, block.shift_size
        return (min(h, size[0]), min(w, size[1])), (
            h // 2 if shifted and size[0] > h else 0,
            w // 2 if shifted and size[1] > w else 0,
        )

    @staticmethod
    def _windows(keep, grid, level, window, shift, table) -> Windows:
        unit = 2**level
        if keep.stride(0) == 0:
            keep = keep[:1]
        y, x = nested_order(level, keep.device)
        return cut_windows(
            ((keep // grid[1] * unit)[:, :, None] + y).flatten(1),
            ((keep % grid[1] * unit)[:, :, None] + x).flatten(1),
            unit=unit, size=(grid[0] * unit, grid[1] * unit), window=window, shift=shift, table=table,
        )

    def init_weights(self) -> None:
        """Initialise as MAE's encoder (He et al. 2021, appendix A.1): Xavier-uniform matrices; bias tables stay as they are."""
        init_transformer(self.model)
        nn.init.xavier_uniform_(self.model.patch_embed.proj.weight.flatten(1))


def run_block(block: SwinTransformerBlock, tokens: Tensor, windows: Windows) -> Tensor:
    """Run a timm Swin block on tokens (B, N, C) that meet in `windows`."""
    tokens = tokens + block.drop_path1(window_attention(block.attn, block.norm1(tokens), windows))
    return tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
