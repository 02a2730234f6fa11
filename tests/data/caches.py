"""Caches as the tests look at them."""

import pytest

from sslvision.data import cache as cache_module

RAM = pytest.param("ram", marks=pytest.mark.skipif(cache_module.fcntl is None, reason="no locks here"))
KINDS = ["disk", RAM]


def built(root):
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))
