"""Values of more than 8 bits become 8 bits: by one range for all images of a set, or by rules for a single image."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sslvision.data.source import UnreadableImage
from sslvision.errors import UsageError

Range = tuple[float, float]  # the values that become 0 and 255
AT_ONCE = 1 << 22  # values scaled at a time: the memory needed is that of the result


class ValueRange(NamedTuple):
    """The values that become 0 and 255, for integers of more than 8 bits and for floats; None: the rules for one image."""

    integers: Range | None
    floats: Range | None

    @property
    def setting(self) -> Any:
        """Return the range as `data.value_range` has it: [low, high], or one for each kind of numbers."""
        kinds = {name: list(one) for name, one in self._asdict().items() if one is not None}
        return next(iter(kinds.values())) if len({tuple(one) for one in kinds.values()}) == 1 else kinds


def value_range_from(setting: Any, *, name: str = "data.value_range") -> ValueRange | None:
    """Return the range that a setting of this name gives; None for "auto".

    Raises UsageError for anything else than auto, [low, high], or {integers: [low, high], floats: [low, high]}.
    """
    if setting in (None, "auto"):
        return None
    if isinstance(setting, Mapping) and setting and set(setting) <= {"integers", "floats"}:
        return ValueRange(
            *(_range(setting[kind], name) if kind in setting else None for kind in ("integers", "floats"))
        )
    both = _range(setting, name)
    return ValueRange(both, both)


def _range(setting: Any, name: str) -> Range:
    is_list = isinstance(setting, Sequence) and not isinstance(setting, str) and len(setting) == 2
    numbers = [one for one in setting if isinstance(one, int | float) and math.isfinite(one)] if is_list else []
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise UsageError(
            f"{name}={setting} must be auto, or the values that become black and white, [low, high] with low < "
            f"high: {name}=[0,4095] for 12 bits."
        )
    return float(numbers[0]), float(numbers[1])


def eight_bits(values: np.ndarray, value_range: ValueRange | None = None) -> np.ndarray:
    """Return numbers (H, W) or (H, W, B) of any type as uint8.

    8-bit integers stay as they are, and True becomes 255. All others are scaled by `value_range`; values outside become 0 or
    255. Without one: floats within 0..1 as value * 255, others within 0..65535 as value / 257, and images with values beyond
    that from their own minimum and maximum.

    Raises UnreadableImage for NaN, infinity and complex numbers.
    """
    kind = values.dtype.kind
    if kind == "b":
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if kind not in "iuf":
        raise UnreadableImage(
            f"its pixels are of type {values.dtype}: save real numbers, such as numpy.abs of complex ones"
        )
    given = value_range and (value_range.floats if kind == "f" else value_range.integers)
    low, high = given or _own_range(values)
    span = max(high - low, float(np.finfo(np.float32).tiny))
    result = np.empty(values.shape, np.uint8)
    rows = max(1, AT_ONCE // max(1, values[0].size))
    for start in range(0, len(values), rows):
        part = values[start : start + rows].astype(np.float64)
        _refuse_not_finite(part)
        result[start : start + rows] = np.rint((part - low) / span * 255).clip(0, 255)
    return result


def _own_range(values: np.ndarray) -> Range:
    low, high = float(values.min()), float(values.max())
    _refuse_not_finite(np.array([low, high]))
    if low < 0 or high > 65535:
        return low, high
    return (0, 1) if values.dtype.kind == "f" and high <= 1 else (0, 65535)


def _refuse_not_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise UnreadableImage(
            "its pixels include NaN or infinity: replace them, for example with numpy.nan_to_num, or leave the file out"
        )
