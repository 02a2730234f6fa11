"""Images are paired with masks by their names and folders, and masks are read as numbers of classes."""

import pytest
import torch
from PIL import Image

from sslvision.data.masks import MaskedImages, open_masked_folder, read_mask
from sslvision.data.source import UnreadableImage
from sslvision.errors import DataError


def put(root, *names, size=(8, 6), value=1):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, value).save(file)


def test_two_images_of_one_name_are_refused_because_a_mask_could_be_of_either(tmp_path):
    put(tmp_path, "images/a.jpg", "images/a.png", "masks/a.png")
    with pytest.raises(DataError, match=r"a\.(jpg|png) and .*a\.(jpg|png) have the same name"):
        open_masked_folder(tmp_path)


def names_of(pairs, root):
    return [tuple(str(one.relative_to(root)) for one in pair) for pair in pairs]


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/{split}", "masks/{split}"),
        ("{split}/images", "{split}/labels"),
        ("images/training/city", "annotations/training/city"),
        ("JPEGImages/{split}", "SegmentationClass/{split}"),
    ],
)
def test_pairs_are_found_in_the_layouts_people_have(tmp_path, images, masks):
    for split in ("train", "val"):
        for name in ("a", "b"):
            image, mask = (
                folder.format(split=split).replace("training", {"train": "training", "val": "validation"}[split])
                for folder in (images, masks)
            )
            put(tmp_path, f"{image}/{name}.jpg", f"{mask}/{name}.png")
    found = open_masked_folder(tmp_path)
    assert len(found.train) == len(found.test) == 2
    assert found.remarks == []
    for image, mask in [*found.train, *found.test]:
        assert image.stem == mask.stem
        assert image.suffix == ".jpg"
        assert mask.suffix == ".png"


def test_what_has_no_partner_is_left_out_and_told_and_a_part_is_held_out(tmp_path):
    put(tmp_path, *(f"images/{number}.jpg" for number in range(20)), "images/alone.jpg", "masks/none.png")
    put(tmp_path, *(f"masks/{number}.png" for number in range(20)))
    (tmp_path / "classes.txt").write_text("ground\nsky\n")
    found = open_masked_folder(tmp_path, holdout=0.25)
    assert (len(found.train), len(found.test), found.names) == (15, 5, ("ground", "sky"))
    told = " ".join(found.remarks)
    assert "1 of 21 images have no file of the same name as a mask" in told
    assert "1 of 21 masks have no file of the same name as an image" in told
    assert "5 of 20 images are for testing" in told
    put(tmp_path, "images/new.jpg", "masks/new.png")
    assert set(found.test) <= set(open_masked_folder(tmp_path, holdout=0.25).test) | set(found.train)


def test_folders_without_pairs_or_with_two_masks_are_refused_with_the_layout(tmp_path):
    with pytest.raises(DataError, match="There is no folder"):
        open_masked_folder(tmp_path / "none")
    put(tmp_path, "photos/a.jpg")
    with pytest.raises(DataError, match=r"No image in .* has a mask: 1 images and 0 masks were found\. Expected are"):
        open_masked_folder(tmp_path)
    put(tmp_path, "masks/a.png", "labels/a.png")
    with pytest.raises(DataError, match="1 images have more than one mask"):
        open_masked_folder(tmp_path)


def test_masks_of_16_bits_and_palettes_are_numbers_and_colors_are_refused(tmp_path):
    Image.fromarray(torch.tensor([[0, 300], [7, 65535]], dtype=torch.int32).numpy()).convert("I;16").save(
        tmp_path / "deep.png"
    )
    assert read_mask(tmp_path / "deep.png").tolist() == [[0, 300], [7, 65535]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png")
    assert read_mask(tmp_path / "palette.png").tolist() == [[0, 1]]
    Image.new("RGB", (2, 2)).save(tmp_path / "colors.png")
    with pytest.raises(UnreadableImage, match="not colors"):
        read_mask(tmp_path / "colors.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match="cannot be read"):
        read_mask(tmp_path / "broken.png")


def test_images_are_resized_and_masks_are_not_and_ignored_values_are_no_class(tmp_path):
    put(tmp_path, "images/a.png", "masks/a.png", "masks/tall.png", size=(8, 6), value=3)
    put(tmp_path, "masks/tall.png", size=(6, 8))
    pairs = [(tmp_path / "images/a.png", tmp_path / "masks" / name) for name in ("a.png", "tall.png")]
    images = MaskedImages(pairs, 3, (16, 16), ignore=(255, 3))
    one = images[0]
    assert one.pixels.shape == (3, 16, 16)
    assert one.mask.shape == (6, 8)
    assert one.mask.eq(-1).all()
    assert "8x6 pixels have another shape than the 6x8 of its image" in images[1]
