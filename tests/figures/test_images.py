import math

import numpy as np
import pytest
import torch
from drawings import drawn as pixels
from matplotlib.transforms import Bbox
from torch import Tensor

from sslvision.figures.images import picture_figure


def images(count: int, channels: int = 3, side: int = 32, height: int | None = None) -> Tensor:
    return torch.rand(count, channels, height or side, side, generator=torch.Generator().manual_seed(0))


def triples(a: Tensor, b: Tensor, c: Tensor) -> list[tuple[str, Tensor]]:
    return [("original", a), ("75.5 % hidden", b), ("reconstructed", c)]


def find(picture: np.ndarray, image: Tensor, factor: int) -> list[tuple[int, int]]:
    """Where the enlarged (C, H, W) image stands in the picture, pixel for pixel."""
    gray = image if len(image) == 3 else image.expand(3, -1, -1)
    wanted = np.rint(gray.permute(1, 2, 0).numpy() * 255).repeat(factor, 0).repeat(factor, 1)
    height, width = wanted.shape[:2]
    corners = np.argwhere(np.abs(picture.astype(np.int16) - wanted[0, 0].astype(np.int16)).max(axis=2) <= 1)
    return [
        (y, x)
        for y, x in corners.tolist()
        if picture[y : y + height, x : x + width].shape == wanted.shape
        and np.abs(picture[y : y + height, x : x + width] - wanted).max() <= 1
    ]


@pytest.mark.parametrize(("side", "factor"), [(28, 6), (32, 5), (96, 2), (224, 1)])
def test_every_pixel_of_an_image_is_a_whole_number_of_pixels_in_the_file(side: int, factor: int) -> None:
    a, b, c = images(9, side=side).split(3)
    picture = pixels(picture_figure(triples(a, b, c), title="run"))
    for n in range(3):
        indices = [find(picture, image, factor) for image in (a[n], b[n], c[n])]
        assert [len(place) for place in indices] == [1, 1, 1]
        (y0, x0), (y1, x1), (y2, x2) = (place[0] for place in indices)
        assert y0 == y1 == y2  # original, masked and reconstructed stand in a row, in this order
        assert x0 < x1 < x2


def test_the_images_are_laid_out_in_two_groups_of_triples() -> None:
    a, b, c = images(18).split(6)
    figure = picture_figure(triples(a, b, c), title="run")
    assert figure.get_size_inches()[0] == pytest.approx(7.1, abs=0.1)  # a page's width of text, and its edges
    picture = pixels(figure)
    corners = np.array([find(picture, image, 5)[0] for image in a])
    assert len(set(corners[:, 0])) == 3
    assert len(set(corners[:, 1])) == 2
    assert (corners[0::2, 0] == corners[1::2, 0]).all()


def test_hidden_pixels_are_mid_gray() -> None:
    original = torch.zeros(1, 1, 32, 32)
    masked = torch.full_like(original, math.nan)
    picture = pixels(picture_figure(triples(original, masked, original), title=""))
    assert len(find(picture, torch.full((3, 32, 32), 0.5), 5)) == 1


@pytest.mark.parametrize(("channels", "drawn"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (7, [0, 1, 2])])
def test_gray_color_and_many_channels_are_drawn(channels: int, drawn: list[int]) -> None:
    stack = images(1, channels)
    picture = pixels(picture_figure(triples(stack, stack, stack), title=""))
    assert len(find(picture, stack[0, drawn], 5)) == 3


def test_values_outside_the_range_are_clipped() -> None:
    wild = images(1) * 4 - 2
    picture = pixels(picture_figure(triples(wild, wild, wild), title=""))
    assert len(find(picture, wild[0].clamp(0, 1), 5)) == 3


def test_images_need_not_be_square() -> None:
    tall = images(2, height=48)
    picture = pixels(picture_figure(triples(tall, tall, tall), title=""))
    assert len(find(picture, tall[1], 5)) == 3


def test_the_headings_stand_once_above_each_group() -> None:
    stack = images(6)
    figure = picture_figure(triples(stack, stack, stack), title="MAE, epoch 40")
    assert [text.get_text() for text in figure.texts] == [
        "MAE, epoch 40",
        *["original", "75.5 % hidden", "reconstructed"] * 2,
    ]


@pytest.mark.parametrize(("count", "side"), [(1, 28), (2, 28), (4, 224)])
def test_texts_of_the_grid_overlap_neither_each_other_nor_the_images(count: int, side: int) -> None:
    stack = images(count, side=side)
    figure = picture_figure(triples(stack, stack, stack), title="MAE ViT-Ti/4 on Fashion-MNIST, epoch 40")
    pixels(figure)  # draws it, which settles the layout
    left, right, bottom, top = figure.images[0].get_extent()
    boxes = [text.get_window_extent() for text in figure.texts] + [Bbox([[left, bottom], [right, top]])]
    assert not any(boxes[i].overlaps(boxes[j]) for i in range(len(boxes)) for j in range(i))
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_row_may_have_any_number_of_columns(count: int) -> None:
    stacks = images(4 * count).split(4)
    figure = picture_figure([(f"head {n}", stack) for n, stack in enumerate(stacks)], title="attention")
    picture = pixels(figure)
    assert all(len(find(picture, image, 5)) == 1 for stack in stacks for image in stack)
    assert [text.get_text() for text in figure.texts][1:] == [f"head {n}" for n in range(count)] * 2
