"""Images as grids of square patches."""

import torch
from torch import Tensor


def take_patches(images: Tensor, index: Tensor, patch: int) -> Tensor:
    """Copy some patches of each image: no other pixel is read.

    Args:
        images: (B, C, H, W), sides divisible by `patch`.
        index: (B, K), places on the row-major patch grid.
        patch: side in pixels.

    Returns:
        (B, K, C, patch, patch).
    """
    B, C, H, W = images.shape
    columns = W // patch
    grid = images.view(B, C, H // patch, patch, columns, patch)
    batch = torch.arange(B, device=images.device)[:, None]
    # The three index tensors stand apart, so their common shape (B, K) comes first.
    return grid[batch, :, index // columns, :, index % columns, :]


def put_patches(canvas: Tensor, patches: Tensor, index: Tensor) -> Tensor:
    """Return a copy of `canvas` (B, C, H, W) with `patches` (B, K, C, p, p) at grid places `index` (B, K)."""
    B, C, H, W = canvas.shape
    patch = patches.shape[-1]
    columns = W // patch
    grid = canvas.clone().view(B, C, H // patch, patch, columns, patch)
    batch = torch.arange(B, device=canvas.device)[:, None]
    grid[batch, :, index // columns, :, index % columns, :] = patches
    return grid.view(B, C, H, W)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Return rows `index` (B, K) of `tokens`: (B, L, D) or, shared by the batch, (1, L, D) -> (B, K, D)."""
    B, K = index.shape
    if tokens.shape[0] == 1:
        return tokens[0][index]
    return tokens.gather(1, index[..., None].expand(B, K, tokens.shape[-1]))
