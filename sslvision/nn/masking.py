"""Random masking of patches. MAE.views draws the noise, MAE.losses uses the masks."""

from torch import Tensor


def visible_count(patches: int, mask_ratio: float) -> int:
    """Return the number of visible patches of an image: patches * (1 - mask_ratio), rounded down."""
    return int(patches * (1 - mask_ratio))


def random_keep(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Split every image's patches at random into visible and hidden ones (MAE, section 3, "Masking").

    Args:
        noise: (B, L) random numbers; the patches with the smallest of an image are kept.
        mask_ratio: Fraction to hide.

    Returns:
        keep (B, K) and hidden (B, L - K): patch indices, in the order of their noise.
    """
    order = noise.argsort(dim=1)  # (B, L)
    visible = visible_count(noise.shape[1], mask_ratio)
    return order[:, :visible], order[:, visible:]
