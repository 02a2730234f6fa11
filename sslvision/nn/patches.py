"""Images as grids of square patches."""

import torch
from torch import Tensor
from torch.nn import functional as F


def patchify(images: Tensor, patch: int) -> Tensor:
    """Return the patches of images (B, C, H, W), in the order of `gather_patches`: (B, L, C * patch * patch)."""
    B, C, H, W = images.shape
    grid = images.view(B, C, H // patch, patch, W // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)


def gather_patches(images: Tensor, index: Tensor, patch: int) -> Tensor:
    """Copy some patches of each image; no other pixel is read.

    Args:
        images: (B, C, H, W) with sides divisible by `patch`.
        index: (B, K) indices on the row-major patch grid.
        patch: Side of a patch in pixels.

    Returns:
        (B, K, C, patch, patch).
    """
    B, C = images.shape[:2]
    batch = torch.arange(B, device=images.device)[:, None]
    # Gathering rows of a contiguous copy is faster than gathering scattered pixels.
    return patchify(images, patch)[batch, index].unflatten(2, (C, patch, patch))


def scatter_patches(canvas: Tensor, patches: Tensor, index: Tensor) -> Tensor:
    """Return a copy of `canvas` (B, C, H, W) with `patches` (B, K, C, p, p) at grid indices `index` (B, K)."""
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
        return F.embedding(index, tokens[0])  # on a CPU its gradient is summed in parallel, unlike that of indexing
    return tokens.gather(1, index[..., None].expand(B, K, tokens.shape[-1]))
