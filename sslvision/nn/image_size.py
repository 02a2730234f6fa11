"""The size of images: users give the side of a square or [height, width]; inside it is always (height, width)."""

from typing import Any

from sslvision.errors import UsageError

LARGEST_IMAGE = 16_384  # pixels per side


def height_and_width(size: Any, key: str = "image_size") -> tuple[int, int]:
    """Return height and width in pixels of a size as a user gives it: the side of a square, or both.

    Raises:
        UsageError: It is neither, or a side is out of range.
    """
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    for name, side in (("height", height), ("width", width)):
        if type(side) is not int or not 1 <= side <= LARGEST_IMAGE:
            which = "" if side is size else f"; its {name} is {side}"
            raise UsageError(
                f"{key}={size} must be a whole number of pixels from 1 to {LARGEST_IMAGE:,}, the side of a square, or two of "
                f"them, [height,width]{which}."
            )
    return height, width


def shortest(size: tuple[int, int]) -> int | list[int]:
    """Return a height and width as settings, files and timm have them: a square's side as one number."""
    return size[0] if size[0] == size[1] else [*size]


def written(size: tuple[int, int]) -> str:
    """Return a height and width as they are written on a command line."""
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"


def indivisible(size: tuple[int, int], unit: int) -> str:
    """Return which sides of a size are not multiples of `unit`, and the nearest that are, as the end of a sentence; or ""."""
    names = ("side",) if size[0] == size[1] else ("height", "width")
    found = []
    for name, side in zip(names, size, strict=False):
        near = [str(multiple) for multiple in (side - side % unit, side - side % unit + unit) if multiple]
        if side % unit:
            found.append(f"the {name} {side} (nearest: {' or '.join(near)})")
    return f", unlike {' and '.join(found)}" if found else ""
