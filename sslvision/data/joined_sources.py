"""The splits of a data set as one source, one after another."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from sslvision.data.source import Source


class JoinedSources:
    """Images of several sources, one source after another. It has no labels: ask `place` for the source of an image.

    Args:
        sources: Sources by name, of one data set.
    """

    classes: tuple[str, ...] | None = None
    labels: Tensor | None = None
    images: Tensor | None = None

    def __init__(self, sources: Mapping[str, Source]):
        self.names, self.sources = list(sources), list(sources.values())
        self.name, self.channels = self.sources[0].name, self.sources[0].channels
        self.ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, index: int) -> tuple[str, Source, int]:
        """Return the name of an image's source, the source, and its index there."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.names[number], self.sources[number], index - (int(self.ends[number - 1]) if number else 0)

    def read(self, index: int) -> Tensor:
        """Return an image (C, H, W); see Source."""
        _, source, place = self.place(index)
        return source.read(place)

    def describe(self, index: int) -> str:
        """Return an image's name in its source."""
        _, source, place = self.place(index)
        return source.describe(place)
