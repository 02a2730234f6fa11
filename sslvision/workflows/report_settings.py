"""The settings of `report`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sslvision.errors import UsageError
from sslvision.settings import Sections, option


@dataclass
class Report:
    """All settings of a report."""

    sections: ClassVar[Sections] = {}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    run: list[str] = option(
        [], "run folders; words without = are run folders too: one is reported on, several are compared"
    )
    output: str | None = option(
        None, "path of the HTML file (default: report.html in the run folder; of several runs, beside the first one)"
    )
    follow: bool = option(
        False, "write it again and again while a run goes on; the page loads itself again in a browser"
    )
    map: Literal["tsne", "umap"] = option(
        "tsne", "layout of the map of images of one run; umap needs umap-learn (pip install 'sslvision[report]')"
    )
    every: int = option(30, "follow: seconds between two reports")

    def __post_init__(self) -> None:
        if not self.run:
            raise UsageError("No run folder: say sslvision report outputs/NAME, or several folders to compare them.")
        if self.every < 1:
            raise UsageError(f"every={self.every} is too small: it must be 1 or more.")
