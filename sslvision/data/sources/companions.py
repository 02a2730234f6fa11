"""Folders that belong to images beside them and are no classes: masks, annotations, thumbnails.

They are told by their names: masks/ beside images/, SegmentationClass/ beside JPEGImages/, thumbnails/ among photos. Where
every folder beside them holds images by its name, or the images lie beside them, they are left out. Among folders of other
names they may be classes, and are only mentioned.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence

from sslvision.data.sources.list_images import Found, share, some

IMAGES = {
    "image",
    "images",
    "img",
    "imgs",
    "photo",
    "photos",
    "picture",
    "pictures",
    "pics",
    "jpegimages",
    "rgb",
    "input",
}
COMPANIONS = {
    *("mask", "masks", "label", "labels", "annotation", "annotations", "annot", "annots", "gt", "truth", "groundtruth"),
    *("segmentation", "segmentations", "segmentationclass", "segmentationobject", "trimap", "trimaps", "contours"),
    *("thumb", "thumbs", "thumbnail", "thumbnails", "previews", "overlays", "depth"),
}
NOT_CLASSES = COMPANIONS - {"mask", "label", "depth", "truth", "gt"}  # words that name no class
OTHERS = {
    *("raw", "original", "left", "bit", "jpg", "jpeg", "png", "tr", "ts", "small"),
    *("ground", "fine", "coarse", "class", "object", "instance", "semantic", "binary", "color"),
}

PARTS = re.compile(
    r"(fold|part|batch|shard|chunk|subset|split|page|volume|session|run)s?[-_ ]?\d+|(19|20)\d\d([-_.]?\d\d){0,2}",
    re.IGNORECASE,
)


def is_companion(name: str) -> bool:
    """Return whether a folder's name says that it belongs to images: masks, gtFine, image_labels."""
    words = _words(name)
    return bool(words & COMPANIONS) and words <= COMPANIONS | IMAGES | OTHERS


def holds_images(name: str) -> bool:
    """Return whether a folder's name says that it holds the images: images, JPEGImages, leftImg8bit."""
    words = _words(name)
    return bool(words & IMAGES) and words <= IMAGES | OTHERS


def without_companions(found: Found, remarks: list[str]) -> Found:
    """Return what was found without folders that belong to the images beside them, which are named in `remarks`."""
    beside = defaultdict[str, set[str]](set)  # a folder, and the folders in it
    direct = defaultdict[str, int](int)  # images in a folder itself
    below = defaultdict[str, int](int)  # and in all of its folders
    for path in found.images:
        direct[path.rpartition("/")[0]] += 1
    for folder, count in [*direct.items()]:
        parts = folder.split("/") if folder else []
        for depth, part in enumerate(parts):
            beside["/".join(parts[:depth])].add(part)
            below["/".join(parts[:depth])] += count
    left = [
        f"{parent}/{name}/" if parent else f"{name}/"
        for parent, names in beside.items()
        for name in names
        if is_companion(name)
        and all(is_companion(one) or holds_images(one) for one in names)
        and (any(not is_companion(one) for one in names) or 20 * direct[parent] > direct[parent] + below[parent])
    ]
    if not left:
        return found
    prefixes = tuple(sorted(left))
    images = [path for path in found.images if not path.startswith(prefixes)]
    names = sorted({prefix.split("/")[-2] for prefix in prefixes})
    remarks.append(
        f"Left out: {share(len(found.images) - len(images), len(found.images), 'images')}, in {some(prefixes)}: folders named "
        f"{some(names)} belong to the images beside them, as masks and small copies do. To train on one, give it as data.root."
    )
    folders = {folder for folder in found.folders if not f"{folder}/".startswith(prefixes)}
    return dataclasses.replace(found, images=images, folders=folders)


def question_classes(classes: Sequence[str], images: Sequence[str], remarks: list[str]) -> None:
    """Say that folders are taken for classes whose names say otherwise."""
    if all(PARTS.fullmatch(name) for name in classes):
        remarks.append(
            f"The folders {some([f'{name}/' for name in classes])} are taken for classes, though they are named like parts of "
            "a set or dates. If they are, labels and scores mean nothing."
        )
    odd = [name for name in classes if _words(name) & NOT_CLASSES and is_companion(name)]
    if not odd:
        return
    within = sum(path.startswith(tuple(f"{name}/" for name in odd)) for path in images)
    remarks.append(
        f"{some([f'{name}/' for name in odd])} with {share(within, len(images), 'images')} is taken for a class, as the "
        "folders beside it are. If its images belong to theirs (masks, small copies), move it out of the folder."
    )


def _words(name: str) -> set[str]:
    spaced = re.sub(r"(?<=[a-z\d])(?=[A-Z])", " ", name)
    return {word.lower() for word in re.findall(r"[^\W\d_]+", spaced)}
