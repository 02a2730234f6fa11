"""The values that become black and white in images of more than 8 bits: one decision for a whole set, from a sample of it.

- Integers from 0 up: the bit depth in use, of 8, 10, 12, 14 and 16 bits: 12-bit values in 16-bit files are 0..4095.
- Floats within 0..1: 0..1.
- Others, such as CT in Hounsfield units: the least and greatest value of the sample, without outliers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslvision.data.decode import Header, read_header, sampled_values
from sslvision.data.eight_bits import Range, ValueRange, eight_bits
from sslvision.data.order import Order
from sslvision.data.source import UnreadableImage

HEADERS, IMAGES = 64, 32  # files looked at, and those of them whose pixels are read
KEPT = 1 << 16  # values of each image for percentiles and gray levels
DEPTHS = (8, 10, 12, 14, 16)
FEW = 32  # gray levels


@dataclass(frozen=True)
class Sampled:
    """The values of one image, before they are scaled: their type, least and greatest, and up to KEPT of them."""

    dtype: np.dtype[Any]
    low: float
    high: float
    values: np.ndarray

    @property
    def is_float(self) -> bool:
        """Return whether the values are floats."""
        return self.dtype.kind == "f"


def look_at(
    source: Any, given: ValueRange | None, *, of_run: bool = False
) -> tuple[ValueRange | None, tuple[str, ...]]:
    """Return the value range of a source of files, and what there is to say of its images, in sentences.

    Args:
        source: An EncodedSource.
        given: Its range, if it is given; None to decide. Without images of more than 8 bits there is nothing to decide.
        of_run: Whether the images are predicted, and a run has determined the channels.
    """
    headers, sampled, unreadable = list[Header](), list[Sampled](), list[str]()
    for index in Order(len(source), seed=0, epoch=0)[:HEADERS].tolist():
        try:
            path = source.file(index)
            header = read_header(path, source.channels, max_pixels=source.max_pixels)
            if header.wide:
                sampled.append(_sample(sampled_values(path, source.channels, max_pixels=source.max_pixels)))
            headers.append(header)
        except UnreadableImage as error:
            unreadable.append(f"{source.describe(index)} ({error})")
        if len(sampled) == IMAGES:
            break
    remarks = _of_headers(headers, of_run=of_run)
    if (
        unreadable and headers and not of_run
    ):  # a prediction has a row for each; without any that can be read training ends
        remarks.append(_of_unreadable(unreadable, len(headers)))
    setting = "value_range" if of_run else "data.value_range"
    decided = given or (decide(sampled) if sampled else None)
    if sampled and decided is not None:
        remarks += _of_values(sampled, decided, len(headers), setting)
    elif headers and decided is not None:
        remarks.append(
            f"All {len(headers):,} images looked at have 8 bits and stay as they are, so that {setting}={_written(decided)} "
            "has no effect on them."
        )
    return decided, tuple(remarks)


def _of_unreadable(unreadable: Sequence[str], read: int) -> str:
    more = f" and {len(unreadable) - 3:,} more" if len(unreadable) > 3 else ""
    return (
        f"{_share(len(unreadable), len(unreadable) + read)} cannot be read, and others will take their place: "
        f"{', '.join(unreadable[:3])}{more}."
    )


def decide(sampled: Sequence[Sampled]) -> ValueRange:
    """Return the range of a sample; that of one kind of numbers is used for both if the sample has only one."""
    integers = _of_integers([one for one in sampled if not one.is_float])
    floats = _of_floats([one for one in sampled if one.is_float])
    return ValueRange(integers or floats, floats or integers)


def _sample(pages: list[np.ndarray]) -> Sampled:
    values = [page.reshape(-1)[:: max(1, page.size * len(pages) // KEPT)] for page in pages]
    low, high = min(page.min() for page in pages), max(page.max() for page in pages)
    return Sampled(pages[0].dtype, float(low), float(high), np.concatenate(values))


def _of_integers(sampled: Sequence[Sampled]) -> Range | None:
    if not sampled:
        return None
    low, high = min(one.low for one in sampled), max(one.high for one in sampled)
    depth = next((depth for depth in DEPTHS if high < 2**depth), None)
    return (0, 2**depth - 1) if low >= 0 and depth is not None else _without_outliers(sampled)


def _of_floats(sampled: Sequence[Sampled]) -> Range | None:
    if not sampled:
        return None
    low, high = min(one.low for one in sampled), max(one.high for one in sampled)
    return (0, 1) if low >= 0 and high <= 1 else _without_outliers(sampled)


def _without_outliers(sampled: Sequence[Sampled]) -> Range:
    """Return the least and greatest value, unless they are further than half of the usual range from it."""
    values = np.concatenate([one.values.astype(np.float64) for one in sampled])
    low, high = min(one.low for one in sampled), max(one.high for one in sampled)
    usual_low, usual_high = (float(value) for value in np.percentile(values, (0.1, 99.9)))
    reach = (usual_high - usual_low) / 2 or np.inf
    low = low if usual_low - low <= reach else usual_low
    high = high if high - usual_high <= reach else usual_high
    return (low, high) if low < high else (low, low + 1)


def _of_headers(headers: Sequence[Header], *, of_run: bool) -> list[str]:
    pages, bands, deep = (sum(bool(header[place]) for header in headers) for place in (3, 4, 5))
    remarks = []
    if pages:
        remarks.append(
            f"{_share(pages, len(headers))} have several pages or frames, of which the first alone is used"
            + (
                "."
                if of_run
                else ": data.channels=N data.normalize=computed reads N pages of one size as channels; convert other files to "
                "one image per page."
            )
        )
    if bands:
        remarks.append(
            f"{_share(bands, len(headers))} have bands beyond gray or color, which are left out"
            + ("." if of_run else ": data.channels=N data.normalize=computed reads N bands.")
        )
    if deep:
        remarks.append(
            f"{_share(deep, len(headers))} have 16 bits per color, of which the upper 8 are used: TIFF and PNG are read in "
            'full with pip install "sslvision[tiff]".'
        )
    return remarks


def _of_values(sampled: Sequence[Sampled], decided: ValueRange, looked_at: int, setting: str) -> list[str]:
    remarks = []
    others = looked_at - len(sampled)
    kept = f". The other {others:,} have 8 bits and stay as they are: their 255 is white" if others else ""
    for kind, found in (("floats", decided.floats), ("integers", decided.integers)):
        some = [one for one in sampled if one.is_float == (kind == "floats")]
        if not some or found is None:
            continue
        low, high = min(one.low for one in some), max(one.high for one in some)
        values = np.concatenate([one.values for one in some])
        outside = 100 * float(np.mean((values < found[0]) | (values > found[1])))
        clipped = f"; {outside:.2g} % of the values are beyond and become one of them" if outside else ""
        types = ", ".join(sorted({str(one.dtype) for one in some}))
        remarks.append(
            f"{_share(len(some), looked_at)} have values of {types}, from {low:g} to {high:g}: {found[0]:g} becomes black and "
            f"{found[1]:g} white in all images ({setting}={_written(decided)}{clipped}){kept}."
        )
    levels = [len(np.unique(eight_bits(one.values[:, None], decided))) for one in sampled]
    possible = [len(np.unique(one.values)) for one in sampled]
    few = [level < FEW and level < count for level, count in zip(levels, possible, strict=True)]
    if sum(few) > len(sampled) / 2:
        low, high = min(one.low for one in sampled), max(one.high for one in sampled)
        remarks.append(
            f"{_share(sum(few), len(sampled))} have fewer than {FEW} gray levels after conversion to 8 bits, a median of "
            f"{int(np.median(levels))}: their values span little of {setting}={_written(decided)}. If black and white "
            f"should be their least and greatest value, set {setting}=[{low:g},{high:g}]."
        )
    return remarks


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} images looked at ({100 * part / whole:.3g} %)"


def _written(decided: ValueRange) -> str:
    """Return a range as a setting is written."""
    setting = decided.setting
    if isinstance(setting, dict):
        return "{" + ",".join(f"{kind}:[{low:g},{high:g}]" for kind, (low, high) in setting.items()) + "}"
    return f"[{setting[0]:g},{setting[1]:g}]"
