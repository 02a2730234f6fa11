"""Fixed position embeddings."""

import torch
from torch import Tensor


def sincos_position(width: int, grid: tuple[int, int], num_prefix: int = 0) -> Tensor:
    """2-D sine-cosine position embeddings (MAE, appendix A.1; Vaswani et al. 2017 in each axis).

    The first half of the channels encodes the column, the second the row, each as all sines, then all cosines.

    Args:
        width: Number of channels, a multiple of 4.
        grid: Rows and columns.
        num_prefix: Number of zero rows in front, for class and register tokens.

    Returns:
        (1, num_prefix + rows * columns, width), float32.
    """
    rows, columns = grid
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))  # (width/4,)

    def encode(position: Tensor) -> Tensor:
        angle = position.double()[:, None] * frequency  # (L, width/4)
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # (L, width/2)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    table = torch.cat([encode(column.flatten()), encode(row.flatten())], dim=1)  # (L, width)
    return torch.cat([table.new_zeros(num_prefix, width), table])[None].float()
