"""What tests of image files share."""

import pytest


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves an image and gives the path."""

    def save(image, name, **options):
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def written(tmp_path):
    """Return a function that writes bytes and gives the path."""

    def write(content, name="file.png"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write
