"""The trainings of a ladder: sizes, shares and lengths, before anything is trained."""

import itertools

import pytest

from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError
from sslvision.workflows.ladder import Size, Times, rungs_of, seconds_of, shares_of, sizes_of, trainings_of, value_of

AXES = ("parameters", "images", "updates")


def sizes(rungs=6, factor=2.0, **options):
    backbone = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 4, **options}
    return sizes_of(backbone, build_backbone(**backbone), channels=3, rungs=rungs, factor=factor)


@pytest.mark.parametrize(
    "options", [{"embed_dim": 128, "depth": 4, "num_heads": 2}, {}, {"embed_dim": 192, "depth": 1, "num_heads": 3}]
)
def test_sizes_are_about_geometric_and_end_with_the_recipes_own(options):
    found = sizes(**options)
    assert found[-1].options == ()
    ratios = [after.parameters / before.parameters for before, after in itertools.pairwise(found)]
    assert all(1.5 < ratio < 2.6 for ratio in ratios), ratios
    assert [size.parameters for size in found] == sorted(size.parameters for size in found)
    for size in found[:-1]:
        shape = dict(size.options)
        assert shape["embed_dim"] % shape["num_heads"] == 0
        assert shape["embed_dim"] % 4 == 0


def test_a_backbone_that_is_no_vit_or_too_small_is_refused_with_what_to_do():
    resnet = {"name": "resnet18", "image_size": 32}
    with pytest.raises(UsageError, match=r"resnet18 is none.*axes=\[images,updates\]"):
        sizes_of(resnet, build_backbone(**resnet), channels=3, rungs=4, factor=2.0)
    with pytest.raises(UsageError, match=r"too small for rungs=6 with factor=2: the sizes would have .* fewer rungs"):
        sizes(embed_dim=16, depth=1, num_heads=2)


def test_shares_end_with_all_images_and_have_a_batch_at_least():
    assert shares_of(1000, batch_size=100, rungs=4, factor=2.0) == [125, 250, 500, 1000]
    with pytest.raises(UsageError, match=r"62 of 1,000 images, fewer than batch_size=100: take rungs=4"):
        shares_of(1000, batch_size=100, rungs=5, factor=2.0)


def test_axes_share_the_largest_training_which_is_done_once():
    found = rungs_of(AXES, sizes(rungs=4), [125, 250, 500, 1000], 800, rungs=4, factor=2.0, seed=0)
    assert len({axis[-1] for axis in found.values()}) == 1
    assert [value_of(rung, "updates") for rung in found["updates"]] == [100, 200, 400, 800]
    assert {(rung.images, rung.updates) for rung in found["parameters"]} == {(1000, 800)}
    assert {(rung.size, rung.updates) for rung in found["images"]} == {(sizes(rungs=4)[-1], 800)}
    trainings = trainings_of([found])
    assert len(trainings) == 10
    assert [rung.updates * rung.size.parameters for rung in trainings] == sorted(
        rung.updates * rung.size.parameters for rung in trainings
    )


def test_the_time_of_a_ladder_is_that_of_its_updates_and_of_everything_else():
    small, large = Size(10, (("depth", 1),)), Size(20)
    found = rungs_of(["parameters"], [small, large], [100], 50, rungs=2, factor=2.0, seed=0)["parameters"]
    assert seconds_of(found, {10: Times(0.1, 2), 20: Times(0.3, 5)}) == pytest.approx(50 * 0.4 + 7)
