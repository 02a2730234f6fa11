import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sslvision.augment.crops import Crop
from sslvision.backbones.backbone import Backbone
from sslvision.backbones.build import build_backbone
from sslvision.data.sources.embedded import MemorySource, open_embedded
from sslvision.data.sources.folder import open_folder
from sslvision.errors import StorageError
from sslvision.evaluation import feature_cache
from sslvision.evaluation.feature_cache import cached_features, cached_views, data_digest, weights_digest
from sslvision.evaluation.features import Extraction, FeatureKind, RandomCrops, extract_features
from sslvision.nn.normalize import Normalize

PLACES = [1, 4, 5, 9]


def tiny_vit(**options: Any) -> Backbone:
    torch.manual_seed(0)
    small = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, **options}
    return build_backbone("vit_tiny_patch16_224", image_size=32, channels=1, **small)


def gray(mean: float = 0.3) -> Normalize:
    return Normalize((mean,), (0.35,))


def ten(first: int = 0) -> MemorySource:
    images = open_embedded().train.images
    assert images is not None
    return MemorySource("ten", 1, None, None, images[first : first + 10].clone(), "train")


@pytest.fixture
def folder_of_images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for place in range(10):
        Image.fromarray(ten().images[place, 0].numpy()).save(folder / f"{place}.png")  # type: ignore[index]
    return folder


def refuse(backbone: Backbone) -> Backbone:
    """The same backbone, which must not be run."""

    def stop(*arguments: Any) -> None:
        raise AssertionError("the backbone was run")

    backbone.model.patch_embed.register_forward_pre_hook(stop)
    backbone.model.patch_embed.proj.register_forward_pre_hook(stop)
    return backbone


def keys(folder: Path) -> set[str]:
    assert not list(folder.glob(".*.tmp"))
    assert {file.stem for file in folder.glob("*.npy")} == {file.stem for file in folder.glob("*.json")}
    return {file.stem for file in folder.glob("*.npy")}


@pytest.mark.parametrize("crops", [False, True])
def test_the_first_call_extracts_and_the_second_only_reads(tmp_path: Path, crops: bool) -> None:
    kind = FeatureKind(2, patch_mean=True) if crops else FeatureKind()
    source = RandomCrops(ten(), Crop(32, (0.2, 1.0)), seed=0, epoch=3) if crops else ten()
    expected = extract_features(tiny_vit(), gray(), source, PLACES, kind)
    first = cached_features(tiny_vit(), gray(), source, PLACES, kind, Extraction(batch_size=3), folder=tmp_path)
    second = cached_features(refuse(tiny_vit()), gray(), source, PLACES, kind, folder=tmp_path)
    for where, features in (first, second):
        assert torch.equal(where, expected[0])
        torch.testing.assert_close(features, expected[1], rtol=0, atol=1e-5)
    assert torch.equal(first[1], second[1])
    assert len(keys(tmp_path)) == 1


def test_features_are_mapped_and_writing_to_them_leaves_the_file(tmp_path: Path) -> None:
    _, features = cached_features(tiny_vit(), gray(), ten(), PLACES, folder=tmp_path)
    (file,) = tmp_path.glob("*.npy")
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert file.name in maps.read_text()
    before = np.load(file)
    features.zero_()
    assert (np.load(file) == before).all()
    assert before.any()


def test_the_file_is_plain_numpy_and_says_in_words_what_it_is(tmp_path: Path) -> None:
    crops = RandomCrops(ten(), Crop(32, (0.2, 1.0)), seed=5, epoch=3)
    cached_features(tiny_vit(), gray(), crops, PLACES, FeatureKind(2), folder=tmp_path)
    (key,) = keys(tmp_path)
    about = json.loads((tmp_path / f"{key}.json").read_text())
    assert np.load(tmp_path / f"{key}.npy").shape == (4, 32)
    assert about["features"] == "class tokens of the last 2 blocks"
    assert about["seen"] == "a random crop"
    assert (about["crop"]["scale"], about["crop"]["seed"], about["crop"]["epoch"]) == ([0.2, 1.0], 5, 3)
    assert (about["key"], about["shape"], about["unreadable"], about["precision"]) == (key, [4, 32], [], "float32")


def changed(what: str) -> dict[str, Any]:
    """Arguments of which one thing is another than in `usual`."""
    arguments: dict[str, Any] = {"backbone": tiny_vit(), "normalize": gray(), "source": ten(), "indices": PLACES}
    backbone = arguments["backbone"]
    if what == "one weight":
        with torch.no_grad():
            backbone.model.blocks[1].mlp.fc2.bias[3] += 1e-6
    elif what == "one pixel":
        arguments["source"].images[9, 0, 0, 0] += 1
    elif what == "heads":  # as many weights, of the same values
        arguments["backbone"] = tiny_vit(num_heads=4)
        arguments["backbone"].load_state_dict(backbone.state_dict())
    elif what == "pooling":
        arguments["backbone"] = tiny_vit(pool="avg")
    elif what == "normalization":
        arguments["normalize"] = gray(0.31)
    elif what == "deviation":
        arguments["normalize"] = Normalize((0.3,), (0.36,))
    elif what == "indices":
        arguments["indices"] = [1, 4, 5, 8]
    elif what == "last blocks":
        arguments["kind"] = FeatureKind(1)
    elif what == "patch mean":
        arguments["kind"] = FeatureKind(1, patch_mean=True)
    elif what == "precision":
        arguments["how"] = Extraction(precision=torch.bfloat16)
    elif what.startswith("crop"):
        crop = Crop(32, (0.2, 1.0), flip=what != "crop without flips")
        arguments["source"] = RandomCrops(ten(), crop, seed=int(what == "crop, seed"), epoch=int(what == "crop, epoch"))
    return arguments


def test_whatever_changes_features_makes_a_cache_of_its_own(tmp_path: Path) -> None:
    changes = ["nothing", "one weight", "one pixel", "heads", "pooling", "normalization", "deviation", "indices"]
    changes += ["last blocks", "patch mean", "precision", "crop", "crop without flips", "crop, seed", "crop, epoch"]
    for number, what in enumerate(changes):
        cached_features(**changed(what), folder=tmp_path)
        assert len(keys(tmp_path)) == number + 1, what


@pytest.mark.parametrize("how", [Extraction(batch_size=2), Extraction(workers=1)])
def test_what_does_not_change_features_makes_none(tmp_path: Path, how: Extraction) -> None:
    cached_features(tiny_vit(), gray(), ten(), PLACES, folder=tmp_path)
    cached_features(refuse(tiny_vit()).train(), gray(), ten(), PLACES[::-1], how=how, folder=tmp_path)
    assert len(keys(tmp_path)) == 1


def test_an_image_file_that_changes_is_seen_by_its_size_or_time(tmp_path: Path, folder_of_images: Path) -> None:
    def cached() -> Tensor:
        source = open_folder(folder_of_images, channels=1, holdout=0).train
        return cached_features(tiny_vit(), gray(), source, range(10), folder=tmp_path / "cache")[1]

    before = cached()
    assert torch.equal(cached(), before)
    assert len(keys(tmp_path / "cache")) == 1
    shutil.copyfile(folder_of_images / "3.png", folder_of_images / "4.png")
    after = cached()
    assert len(keys(tmp_path / "cache")) == 2
    assert torch.equal(after[4], after[3])
    os.utime(folder_of_images / "5.png", ns=(0, 0))
    assert torch.equal(cached(), after)
    assert len(keys(tmp_path / "cache")) == 3
    with open(folder_of_images / "5.png", "ab") as file:
        file.write(b" ")
    os.utime(folder_of_images / "5.png", ns=(0, 0))
    assert torch.equal(cached(), after)
    assert len(keys(tmp_path / "cache")) == 4


def test_how_files_are_decoded_and_which_of_them_change_the_key(folder_of_images: Path) -> None:
    gray_source, color = (open_folder(folder_of_images, channels=channels, holdout=0).train for channels in (1, 3))
    digests = {data_digest(gray_source, range(10)), data_digest(color, range(10)), data_digest(gray_source, range(9))}
    assert len(digests) == 3
    assert data_digest(gray_source, range(10)) in digests


def test_a_source_that_decodes_only_some_files_otherwise_has_another_key(
    folder_of_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_folder(folder_of_images, channels=1, holdout=0).train
    before, read = data_digest(source, range(10)), source.read
    monkeypatch.setattr(source, "read", lambda place: read(place).flip(2) if place == 5 else read(place))
    assert data_digest(source, range(10)) != before


def test_unreadable_files_are_left_out_when_the_cache_is_read_too(tmp_path: Path, folder_of_images: Path) -> None:
    (folder_of_images / "4.png").write_bytes(b"no image")
    source = open_folder(folder_of_images, channels=1, holdout=0).train
    for backbone in (tiny_vit(), refuse(tiny_vit())):
        where, features = cached_features(backbone, gray(), source, PLACES, folder=tmp_path / "cache")
        assert where.tolist() == [1, 5, 9]
        assert features.shape == (3, 16)


def test_no_readable_image_is_no_error_of_the_cache(tmp_path: Path) -> None:
    for backbone in (tiny_vit(), refuse(tiny_vit())):
        where, features = cached_features(backbone, gray(), ten(), [], folder=tmp_path)
        assert (where.shape, features.shape) == ((0,), (0, 16))


def test_an_extraction_that_is_cut_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = feature_cache.feature_batches

    def cut_off(*arguments: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        yield next(whole(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_cache, "feature_batches", cut_off)
    with pytest.raises(KeyboardInterrupt):
        cached_features(tiny_vit(), gray(), ten(), PLACES, how=Extraction(batch_size=2), folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_features_without_their_json_or_cut_short_are_extracted_again(tmp_path: Path) -> None:
    _, expected = cached_features(tiny_vit(), gray(), ten(), PLACES, folder=tmp_path)
    expected = expected.clone()
    (file,) = tmp_path.glob("*.npy")
    file.with_suffix(".json").unlink()
    assert torch.equal(cached_features(tiny_vit(), gray(), ten(), PLACES, folder=tmp_path)[1], expected)
    file.write_bytes(file.read_bytes()[:-4])
    assert torch.equal(cached_features(tiny_vit(), gray(), ten(), PLACES, folder=tmp_path)[1], expected)
    assert np.load(file).shape == (4, 16)


def test_a_full_disk_is_noticed_before_anything_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=255)  # 4 images of 16 floats take 256 bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"need 256 bytes, but .*new/cache has 255 bytes free"):
        cached_features(refuse(tiny_vit()), gray(), ten(), PLACES, folder=tmp_path / "new" / "cache")
    assert not list(tmp_path.iterdir())


def test_views_are_the_epochs_and_more_of_them_are_added_to_those_there(tmp_path: Path) -> None:
    crop = Crop(32, (0.2, 1.0))
    cached_views(tiny_vit(), gray(), ten(), PLACES, crop=crop, views=2, seed=1, folder=tmp_path)
    there = keys(tmp_path)
    where, views = cached_views(tiny_vit(), gray(), ten(), PLACES, crop=crop, views=3, seed=1, folder=tmp_path)
    assert where.tolist() == PLACES
    assert there < keys(tmp_path)
    assert len(keys(tmp_path)) == 3
    for epoch, view in enumerate(views):
        _, expected = extract_features(tiny_vit(), gray(), RandomCrops(ten(), crop, seed=1, epoch=epoch), PLACES)
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


def test_the_digest_of_weights_is_the_same_for_the_same_backbone_built_twice() -> None:
    assert weights_digest(tiny_vit()) == weights_digest(tiny_vit())
    with torch.no_grad():
        bf16 = tiny_vit().to(torch.bfloat16)
    assert weights_digest(bf16) != weights_digest(tiny_vit())
