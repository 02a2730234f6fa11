"""What pyproject.toml says is old enough is what `.ci/run` tries."""

import re
import tomllib
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[1]


def test_the_oldest_version_of_every_dependency_is_tried():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    tried = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / ".ci" / "floor.txt").read_text(), re.MULTILINE))
    for dependency in declared:
        name, oldest = re.match(r"([\w-]+)>=([\d.]+)", dependency).groups()
        assert Version(tried[name]) == Version(oldest)
