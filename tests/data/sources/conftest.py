"""What the tests of image folders share."""

import pytest


@pytest.fixture
def plant(tmp_path):
    """Return a function that makes empty files of given names, and returns their folder."""
    root = tmp_path / "photos"
    root.mkdir()

    def make(*names):
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        return root

    return make
