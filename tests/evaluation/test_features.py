from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sslvision.augment.crops import Crop, crop_one
from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.backbone import Backbone
from sslvision.backbones.build import build_backbone
from sslvision.data.loader import TrainingImages
from sslvision.data.source import Source, UnreadableImage
from sslvision.data.sources.embedded import open_embedded
from sslvision.errors import UsageError
from sslvision.evaluation.feature_cache import cached_features
from sslvision.evaluation.features import (
    Extraction,
    FeatureKind,
    RandomCrops,
    compute_features,
    dino_features,
    extract_features,
    feature_dim,
)
from sslvision.nn.normalize import Normalize

CROP = Crop(32, (0.08, 1.0))
PLACES = [3, 8, 20, 21, 5000]


@dataclass
class Listed:
    """A source of embedded images that are not in memory; some of them cannot be read."""

    broken: frozenset[int] = frozenset()
    name: str = "listed"
    channels: int = 1
    classes: None = None
    labels: None = None
    images: None = None
    all: Tensor = field(default_factory=lambda: open_embedded().train.images)

    def __len__(self) -> int:
        return len(self.all)

    def read(self, index: int) -> Tensor:
        if index in self.broken:
            raise UnreadableImage("broken")
        return self.all[index]

    def describe(self, index: int) -> str:
        return f"image {index}"


def seen(source: Source, crop: Crop | None) -> Source:
    """The source itself, or random crops of its images."""
    return source if crop is None else RandomCrops(source, crop, seed=0, epoch=0)


def tiny_vit(**options: object) -> Backbone:
    torch.manual_seed(0)
    small = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, **options}
    return build_backbone("vit_tiny_patch16_224", image_size=32, channels=1, **small).eval()  # type: ignore[arg-type]


def gray() -> Normalize:
    return Normalize((0.3,), (0.35,))


def images(indices: list[int]) -> Tensor:
    return gray()(open_embedded().train.images[indices])


def tokens_of_blocks(backbone: Backbone, pixels: Tensor) -> list[Tensor]:
    """What every block puts out, after the final norm."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, arguments, output: seen.append(output))
        for block in backbone.model.blocks
    ]
    with torch.no_grad():
        backbone.encode(pixels)
        for hook in hooks:
            hook.remove()
        return [backbone.model.norm(tokens) for tokens in seen]


def test_features_are_the_backbones_own_in_eval_mode_and_its_mode_comes_back() -> None:
    backbone = tiny_vit(proj_drop_rate=0.5)
    expected = backbone(images(PLACES)).detach()
    where, features = extract_features(backbone.train(), gray(), open_embedded().train, PLACES)
    assert where.tolist() == PLACES
    torch.testing.assert_close(features, expected)
    assert backbone.training
    assert not features.requires_grad


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"init_values": 0.1, "qk_norm": True}])
def test_class_tokens_of_the_last_blocks_are_normed_and_lie_side_by_side(options: dict[str, object]) -> None:
    backbone = tiny_vit(**options)
    first, second, third = tokens_of_blocks(backbone, images(PLACES))
    source = open_embedded().train
    _, features = extract_features(backbone, gray(), source, PLACES, FeatureKind(2))
    torch.testing.assert_close(features, torch.cat([second[:, 0], third[:, 0]], dim=1))
    _, features = extract_features(backbone, gray(), source, PLACES, FeatureKind(3, patch_mean=True))
    patches = third[:, backbone.num_prefix :].mean(dim=1)  # registers are no patches
    torch.testing.assert_close(features, torch.cat([first[:, 0], second[:, 0], third[:, 0], patches], dim=1))


def test_the_last_class_token_is_the_pooled_feature() -> None:
    backbone, source = tiny_vit(), open_embedded().train
    _, pooled = extract_features(backbone, gray(), source, PLACES)
    torch.testing.assert_close(extract_features(backbone, gray(), source, PLACES, FeatureKind(1))[1], pooled)


def test_gradient_checkpointing_changes_no_feature() -> None:
    backbone = tiny_vit()
    _, expected = extract_features(backbone, gray(), open_embedded().train, PLACES, FeatureKind(2))
    backbone.model.set_grad_checkpointing()
    _, features = extract_features(backbone.train(), gray(), open_embedded().train, PLACES, FeatureKind(2))
    assert torch.equal(features, expected)


@pytest.mark.parametrize("name", ["vit", "test_resnet"])
def test_a_backbone_without_a_class_token_gives_its_pooled_feature(name: str) -> None:
    options: dict[str, object] = {"class_token": False, "pool": "avg"}
    backbone = tiny_vit(**options) if name == "vit" else build_backbone(name, image_size=32, channels=1).eval()
    with torch.no_grad():
        expected = backbone(images(PLACES))
        assert torch.equal(compute_features(backbone, images(PLACES), FeatureKind(4, patch_mean=True)), expected)
    assert dino_features(backbone) == FeatureKind()
    assert feature_dim(backbone, FeatureKind(4, patch_mean=True)) == expected.shape[1]


def test_dino_takes_four_class_tokens_of_a_small_vit_and_one_with_the_patches_of_a_larger() -> None:
    assert dino_features(tiny_vit(depth=5)) == FeatureKind(4)
    assert dino_features(tiny_vit()) == FeatureKind(3)
    assert dino_features(tiny_vit(embed_dim=768, depth=1)) == FeatureKind(1, patch_mean=True)


def test_more_blocks_than_there_are_are_refused() -> None:
    with pytest.raises(UsageError, match="this ViT has 3 blocks"):
        extract_features(tiny_vit(), gray(), open_embedded().train, PLACES, FeatureKind(4))


@pytest.mark.parametrize("crop", [None, CROP])
def test_neither_batches_nor_the_order_of_places_matter(crop: Crop | None) -> None:
    backbone, source = tiny_vit(), seen(open_embedded().train, crop)
    _, together = extract_features(backbone, gray(), source, PLACES)
    where, apart = extract_features(backbone, gray(), source, PLACES[::-1], how=Extraction(batch_size=2))
    assert where.tolist() == PLACES
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("crop", [None, CROP])
def test_unreadable_images_are_left_out(crop: Crop | None) -> None:
    source = seen(Listed(frozenset({8, 20, 21})), crop)
    where, features = extract_features(tiny_vit(), gray(), source, PLACES, how=Extraction(batch_size=2))
    _, all_features = extract_features(tiny_vit(), gray(), seen(Listed(), crop), PLACES)
    assert where.tolist() == [3, 5000]
    torch.testing.assert_close(features, all_features[[0, 4]])


def test_no_images_have_no_features() -> None:
    where, features = extract_features(tiny_vit(), gray(), open_embedded().train, [], FeatureKind(2))
    assert where.shape == (0,)
    assert features.shape == (0, 64)


def test_a_view_is_the_crop_of_seed_epoch_and_place() -> None:
    backbone, source = tiny_vit(), open_embedded().train
    rng = ImageRandom(7, torch.full((5,), 2), torch.tensor(PLACES))
    cut = [
        crop_one(source.read(place), ImageRandom(7, rng.epoch[at : at + 1], rng.index[at : at + 1]), 0, CROP)
        for at, place in enumerate(PLACES)
    ]
    _, features = extract_features(backbone, gray(), RandomCrops(source, CROP, seed=7, epoch=2), PLACES)
    torch.testing.assert_close(features, backbone(gray()(torch.stack(cut))).detach())
    _, other = extract_features(backbone, gray(), RandomCrops(source, CROP, seed=7, epoch=3), PLACES)
    assert (other - features).abs().max() > 1e-3


def test_views_are_the_crops_of_training() -> None:
    crops = RandomCrops(Listed(), CROP, seed=7, epoch=2)
    batch = TrainingImages(Listed(), (CROP,), 7).__getitems__([(2, place) for place in PLACES])
    assert torch.equal(torch.stack([crops.read(place) for place in PLACES]), batch.crops[0])


def test_crops_of_another_size_than_the_backbones_are_refused() -> None:
    with pytest.raises(UsageError, match="images of 32 pixels, the backbone's size, but the random crops have 64"):
        extract_features(tiny_vit(), gray(), seen(open_embedded().train, Crop(64, (0.08, 1.0))), PLACES)


def test_progress_counts_the_images_done() -> None:
    told: list[tuple[int, int]] = []
    how = Extraction(batch_size=2, progress=lambda done, total: told.append((done, total)))
    extract_features(tiny_vit(), gray(), open_embedded().train, PLACES, how=how)
    assert told == [(2, 5), (4, 5), (5, 5)]


def _on_one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    source = seen(open_embedded().train, CROP)
    given = (tiny_vit(), gray(), source, PLACES, FeatureKind(2), Extraction(batch_size=2, rank=rank, world_size=2))
    extracted = extract_features(*given)
    cached = cached_features(*given, folder=folder / "cache")
    again = cached_features(*given, folder=folder / "cache")
    torch.save([extracted, cached, again], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.e2e
def test_two_processes_give_what_one_gives_each_image_once(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_on_one_of_two, (tmp_path,), nprocs=2)
    where, features = extract_features(tiny_vit(), gray(), seen(open_embedded().train, CROP), PLACES, FeatureKind(2))
    for rank in (0, 1):
        for found, rows in torch.load(tmp_path / f"{rank}.pt"):
            assert torch.equal(found, where)
            torch.testing.assert_close(rows, features, rtol=0, atol=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # one .npy, one .json
