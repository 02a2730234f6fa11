"""What could not be read for want of a plugin is read once the plugin is there, caches or not."""

import logging

import numpy as np
import pytest
import torch
from caches import built
from PIL import Image

from sslvision.backbones.build import build_backbone
from sslvision.data import encoded, image_plugins
from sslvision.data.source import UnreadableImage
from sslvision.data.sources.folder import open_folder
from sslvision.evaluation.feature_cache import cached_features
from sslvision.nn.normalize import Normalize

NO_PLUGIN = 'HEIC is read by a plugin (pillow-heif): pip install "sslvision[heic]"'


@pytest.fixture
def lacking(tmp_path, monkeypatch):
    """Return a source of six files, two of which cannot be read until plugin() is called, and one is damaged."""
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "5.png").write_bytes(b"nothing")
    source = open_folder(tmp_path / "photos", holdout=0).train
    known, missing = encoded.read_image, {"1.png", "3.png"}

    def read(path, *given, **more):
        if path.rpartition("/")[2] in missing:
            raise UnreadableImage(NO_PLUGIN)
        return known(path, *given, **more)

    monkeypatch.setattr(encoded, "read_image", read)
    return source, missing.clear


@pytest.mark.parametrize("kind", ["disk", "ram"])
def test_a_cache_made_before_a_plugin_was_there_is_made_anew_and_that_is_told(lacking, cache_of, caplog, kind):
    source, plugin = lacking
    kept = cache_of(source, kind)
    with pytest.raises(UnreadableImage, match="HEIC is read by a plugin"):
        kept.read(1)
    plugin()
    with caplog.at_level(logging.WARNING):
        kept = cache_of(source, kind)
    assert "lacks 2 of 3 unreadable images that can be read now, such as with a new plugin (HEIC" in caplog.text
    assert torch.equal(kept.read(1), source.read(1))
    assert torch.equal(kept.read(3), source.read(3))
    with pytest.raises(UnreadableImage, match="content is not"):
        kept.read(5)
    assert len(built(cache_of.root)) == 2
    caplog.clear()
    assert torch.equal(cache_of(source, kind).read(3), source.read(3))
    assert len(built(cache_of.root)) == 2


def test_a_cache_without_new_readers_is_used_in_silence(lacking, cache_of, caplog):
    source, _ = lacking
    cache_of(source)
    with caplog.at_level(logging.WARNING):
        cache_of(source)
    assert caplog.text == ""
    assert len(built(cache_of.root)) == 1


def test_features_are_computed_again_with_the_images_that_can_be_read_now(lacking, tmp_path):
    source, plugin = lacking
    backbone = build_backbone("vit_tiny_patch16_224", image_size=16, embed_dim=16, depth=1, num_heads=2, patch_size=8)
    given = (backbone, Normalize([0.5] * 3, [0.5] * 3), source)
    asked = [0, 1, 2, 3, 5]
    indices, _ = cached_features(*given, asked, folder=tmp_path / "features")
    assert indices.tolist() == [0, 2]
    plugin()
    indices, features = cached_features(*given, asked, folder=tmp_path / "features")
    assert indices.tolist() == [0, 1, 2, 3]
    assert len(features) == 4


def test_the_reason_of_a_format_is_that_of_its_plugin():
    assert next(one for one in image_plugins.EXTRA_FORMATS if one.name == "HEIC").reason == NO_PLUGIN
