"""The layout of a folder of images: which of its folders are splits, and which are classes.

A split is told by its name: train, training, trainval; val, valid, validation, dev; test, testing, eval, evaluation; in any
case, with digits and with words such as "set", "data" or "images" before or after (training_set, imgs_val, train2017).
Further words must be those of the other splits (seg_train with seg_test), so that train_station and test_tube stay classes.
What was guessed or left out is added to `remarks`, in sentences.
"""

import os
import re
from collections import defaultdict
from collections.abc import Sequence

from sslvision.data.sources.companions import question_classes
from sslvision.data.sources.list_images import Found, share, some
from sslvision.errors import DataError

SPLITS = {
    "train": ("train", "training", "trainval"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
AFFIXES = (
    *("set", "sets", "data", "dataset", "datasets", "split", "folder", "dir", "files", "full"),
    *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pic", "pics", "jpg", "jpeg", "png"),
)
GLUED = re.compile(
    rf"(?P<a>{'|'.join(SPLIT_OF)})(?P<b>{'|'.join(AFFIXES)})|(?P<c>{'|'.join(AFFIXES)})(?P<d>{'|'.join(SPLIT_OF)})"
)
FEW_STRAYS = 0.05  # of all images; a single one is always few


def split_of(name: str) -> tuple[str | None, str]:
    """Return the split that a folder's name tells (train, validation or test; else None), and the other words of the name."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    words: list[str] = []
    for word in re.findall(r"[^\W\d_]+", spaced):
        glued = None if word in SPLIT_OF else GLUED.fullmatch(word)
        words += [part for part in glued.groups() if part] if glued else [word]
    splits = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
    if splits == {"train", "validation"}:  # train_val
        splits = {"train"}
    rest = " ".join(word for word in words if word not in SPLIT_OF and word not in AFFIXES)
    return (splits.pop() if len(splits) == 1 else None), rest


def split_of_file(file: str, *, folders: int = 1) -> str | None:
    """Return the split that the name of a file tells, or that of the nearest of so many folders above it."""
    above = os.path.dirname(file).split(os.sep)
    names = [os.path.splitext(os.path.basename(file))[0], *above[: -1 - folders : -1]]
    return next((split for name in names if (split := split_of(name)[0]) is not None), None)


def unwrapped(found: Found, remarks: list[str]) -> tuple[str, Found]:
    """Return the folder that holds the splits or classes, relative to the root, and what is in it.

    It is the root itself ("") unless that holds nothing but one other folder, as an unpacked archive often does.
    """
    first, last = (path.split("/")[:-1] for path in (min(found.images), max(found.images)))
    common: list[str] = []
    for one, other in zip(first, last, strict=False):
        if one != other or split_of(one) == ("train", ""):
            break
        common.append(one)
    prefix = "".join(f"{folder}/" for folder in common)
    inner = [path.removeprefix(prefix) for path in found.images]
    if not common or not any("/" in path for path in inner):
        return "", found
    remarks.append(f"The only folder with images is {prefix}, which is taken for the data set itself.")
    folders = {path.removeprefix(prefix) for path in found.folders if path.startswith(prefix)}
    return prefix.removesuffix("/"), Found(inner, folders)


def split_folders(root: str, found: Found, remarks: list[str]) -> tuple[str, list[str]]:
    """Return the folder of the training images, and the existing ones of validation and test images, in that order.

    They are relative to the root; "" is the root itself.

    Raises:
        DataError: The folder of training images is empty beside one of held-out images.
    """
    tops = sorted({path.partition("/")[0] for path in found.images if "/" in path})
    named: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in tops:
        split, rest = split_of(name)
        if split is not None:
            named[rest][split].append(name)
    _refuse_empty_train(root, found, tops, [folder for one in named[""].values() for folder in one])
    sets = {rest: splits for rest, splits in named.items() if "train" in splits and len(splits) > 1}
    if len(sets) == 1 or "" in sets:
        splits = sets.get("") or next(iter(sets.values()))
        train, *held = (_first(splits[split], split) for split in SPLITS if split in splits)
        if any(name.lower() not in SPLIT_OF for name in (train, *held)):
            remarks.append(
                f"By their names, {train}/ is taken for training and {' and '.join(held)}/ for held-out images."
            )
        _tell_unused(found, (train, *held), remarks)
        return train, held
    flat = sum("/" not in path for path in found.images)
    if len(tops) == 1 and split_of(tops[0]) == ("train", "") and are_few(flat, len(found.images)):
        _tell_unused(found, tops, remarks)
        return tops[0], []
    _question_names(named, remarks)
    return "", []


def _first(names: Sequence[str], split: str) -> str:
    """Return the folder with the most usual name."""
    usual = SPLITS[split]
    return min(names, key=lambda name: (usual.index(name.lower()) if name.lower() in usual else len(usual), name))


def _refuse_empty_train(root: str, found: Found, tops: Sequence[str], split_named: Sequence[str]) -> None:
    held = [name for name in split_named if split_of(name)[0] != "train"]
    empty = [name for name in found.folders - set(tops) if "/" not in name and split_of(name) == ("train", "")]
    if held and empty and len(held) == len(split_named):
        raise DataError(
            f"{os.path.join(root, min(empty))} holds no images, and {held[0]}/ beside it does. Put the training images "
            f"there, or give {os.path.join(root, held[0])} as data.root to train on those."
        )


def _tell_unused(found: Found, used: Sequence[str], remarks: list[str]) -> None:
    prefixes = tuple(f"{folder}/" for folder in used)
    if unused := [path for path in found.images if not path.startswith(prefixes)]:
        *others, last = prefixes
        within = f"{', '.join(others)} and {last}" if others else last
        where = sorted({f"{top}/" if below else top for top, below, _ in (path.partition("/") for path in unused)})
        remarks.append(
            f"{share(len(unused), len(found.images), 'images')} outside {within} are not used: those in {some(where)}."
        )


def _question_names(named: dict[str, defaultdict[str, list[str]]], remarks: list[str]) -> None:
    """Say that folders look like splits and are not used as such."""
    names = sorted(name for splits in named.values() for several in splits.values() for name in several)
    splits = {split for one in named.values() for split in one}
    if "train" in splits and len(splits) > 1:
        remarks.append(
            f"Folders are named like splits, but of several sets: {some([f'{name}/' for name in names])}. They are not taken "
            "for splits, so all their images are trained on. If they are splits, name them train/, val/ and test/."
        )


def images_and_classes(
    found: Found, folder: str, remarks: list[str], *, name: str, at_least_classes: int = 2
) -> tuple[list[str], tuple[str, ...] | None]:
    """Return the sorted paths of a folder's images, relative to it, and its classes.

    Of images beside the class folders, a few are left out; with many, no image has a label.

    Args:
        found: What is in the root.
        folder: The folder, relative to the root; "" is the root.
        remarks: Receives what the user should know.
        name: Name of the folder, for remarks.
        at_least_classes: With fewer folders there are no classes.
    """
    prefix = f"{folder}/" if folder else ""
    images = sorted(path.removeprefix(prefix) for path in found.images if path.startswith(prefix))
    folders = {path.removeprefix(prefix) for path in found.folders if path.startswith(prefix)}
    strays = [path for path in images if "/" not in path]
    classes = sorted({path.partition("/")[0] for path in images if "/" in path})
    if len(classes) < at_least_classes:
        return images, None
    if not named_like_classes(classes):
        remarks.append(
            f"The folders of {name} are named like splits ({some(classes)}) and not like classes: no image has a label."
        )
        return images, None
    if strays:
        outside = f"{name}: {share(len(strays), len(images), 'images')}, {some(strays)}, outside the class folders"
        if not are_few(len(strays), len(images)):
            remarks.append(
                f"{outside}, so folders are not taken for classes and no image has a label. For labels, every image must be "
                f"in the folder of its class ({some(classes)})."
            )
            return images, None
        remarks.append(f"{outside}: left out.")
        images = [path for path in images if "/" in path]
    if empty := sorted(name for name in folders - set(classes) if "/" not in name):
        remarks.append(f"{name}: class folders without images are ignored: {some(empty)}.")
    below = (split_of(path.partition("/")[2]) for path in folders if path.count("/") == 1)
    if {"train"} < {split for split, rest in below if split and not rest}:
        remarks.append(
            f"The class folders of {name} hold folders named like splits, whose images are not told apart. If they are splits, "
            f"put the classes into them: train/{classes[0]}/ and test/{classes[0]}/."
        )
    question_classes(classes, images, remarks)
    return images, tuple(classes)


def are_few(strays: int, images: int) -> bool:
    """Return whether images beside folders are so few that they were put there by mistake."""
    return strays <= max(1, FEW_STRAYS * images)


def named_like_classes(names: Sequence[str]) -> bool:
    """Return whether folders may be classes: not all are named like splits, nor like several splits of several sets."""
    told = [split_of(name) for name in names]
    if any(split is None for split, _ in told):
        return True
    sets: defaultdict[str, set[str | None]] = defaultdict(set)
    for split, rest in told:
        sets[rest].add(split)
    return not (set(sets) == {""} or all({"train"} < splits for splits in sets.values()))


def check_classes(root: str, train: tuple[str, Sequence[str]], held: tuple[str, Sequence[str]]) -> None:
    """Raise DataError if a folder of held-out images has classes that the one of training images has not."""
    (train_folder, train_names), (held_folder, held_names) = train, held
    if unknown := sorted(set(held_names) - set(train_names)):
        raise DataError(
            f"{os.path.join(root, held_folder)} has classes that {train_folder}/ has not: {some(unknown)} "
            f"({train_folder}/ has {some(train_names)}). Class folders must have the same names in both."
        )
