"""Caches as the tests look at them."""

import pytest

from sslvision.data import cache as cache_module

KINDS = ["disk", pytest.param("ram", marks=pytest.mark.skipif(cache_module.fcntl is None, reason="no locks here"))]


def built(root):
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))
