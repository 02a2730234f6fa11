"""From rows with labels and splits, as in a list, a table or shards, to the splits of a data set.

- Classes are sorted by name, or by number where all are numbers.
- Of images without a label among labeled ones, a few are left out; with many, no image has a label.
- Held-out images without labels are not used where the training images have some.
- Without held-out images, a fraction is held out by a hash of the images' keys, as in a folder.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from sslvision.data.sources.folder import hold_out
from sslvision.data.sources.layout import are_few, split_of
from sslvision.data.sources.list_images import share, some
from sslvision.errors import DataError

SPLITS = ("train", "validation", "test")
NONE = -1  # the number of a missing label
SEPARATORS = ("|", ";", ",", " ")  # between several labels in one value


class Part(NamedTuple):
    """Images of one split: their rows (M,) and labels (M,), if they have any."""

    rows: np.ndarray
    labels: Tensor | None


class Codes:
    """Values as numbers, in the order in which they come: 0, 1, ...; NONE for a missing one.

    Args:
        of: Turns a value into text, or None; None for `label_text`.
    """

    def __init__(self, of: Callable[[Any], str | None] | None = None):
        self.of, self.known = of or label_text, dict[Any, int]()
        self.names: dict[str, int] = {}

    def __call__(self, value: Any) -> int:
        try:
            return self.known[value]
        except KeyError:
            text = self.of(value)
            self.known[value] = NONE if text is None else self.names.setdefault(text, len(self.names))
            return self.known[value]
        except TypeError:  # lists cannot be keys
            text = self.of(value)
            return NONE if text is None else self.names.setdefault(text, len(self.names))


def label_text(value: Any) -> str | None:
    """Return a label as text; None if there is none.

    Raises:
        DataError: It is several labels, or no class.
    """
    if isinstance(value, list | tuple | np.ndarray):
        if len(value) > 1:
            refuse_several(f"{str([*value])[:60]}")
        return label_text(value[0]) if len(value) else None
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float):
        if value != int(value):
            raise DataError(
                f"The label {value} is a number with a fraction: labels here are classes. Give a column of classes as "
                "data.label."
            )
        return str(int(value))
    if isinstance(value, dict):
        raise DataError(f"The label {str(value)[:60]} is an object: give a column of classes as data.label.")
    return str(value).strip()


def split_code(value: Any) -> int:
    """Return which of SPLITS a value names; raises DataError if none."""
    split, rest = split_of(str(value))
    if split is None or rest:
        raise DataError(f"The split {value!r} is none of train, val (valid, validation, dev) and test (eval).")
    return SPLITS.index(split)


def refuse_several(example: str) -> NoReturn:
    """Refuse labels that are several classes each."""
    raise DataError(
        f"Images have several labels each, such as {example}. An image has one label here: keep the label that matters most "
        "in a column of its own and give it as data.label, or train a classifier for each question. Pretraining needs no "
        "labels: data.label=none reads none."
    )


def check_single(names: Sequence[str]) -> None:
    """Raise DataError if the names of classes are several labels each: cat, dog and "cat|dog"."""
    known = set(names)
    for separator in SEPARATORS:
        joined = [name for name in names if len([part for part in name.split(separator) if part.strip()]) > 1]
        parts = {part.strip() for name in names for part in name.split(separator)} - {""}
        several = [name for name in joined if known.issuperset(part.strip() for part in name.split(separator))]
        if several or (separator in "|;" and joined and len(names) > len(parts)):
            refuse_several(repr((several or joined)[0]))
    if lists := [name for name in names if name.startswith("[") and "," in name]:
        refuse_several(repr(lists[0]))


def parts_of(
    key: Callable[[int], str],
    labels: np.ndarray,
    names: Sequence[str],
    splits: np.ndarray,
    *,
    title: str,
    holdout: float,
    remarks: list[str],
    in_order: bool = False,
) -> tuple[list[Part], tuple[str, ...] | None]:
    """Return training, then validation and test images, as far as there are any, and the names of the classes.

    Args:
        key: Returns what a row is held out by, such as its path.
        labels: (N,) int64, indices of `names`, or NONE.
        names: Names of the classes.
        splits: (N,) indices of SPLITS.
        title: Name of the set, for messages.
        holdout: Fraction to hold out if there is no split.
        remarks: Receives what the user should know.
        in_order: Keep all names, and their order, instead of sorting those that have images.

    Raises:
        DataError: There are no training images, or held-out images of classes that these do not have.
    """
    rows = [np.flatnonzero(splits == split) for split in range(len(SPLITS))]
    if not len(rows[0]):
        there = [f"{len(held):,} of {split}" for split, held in zip(SPLITS, rows, strict=True) if len(held)]
        raise DataError(f"{title} has no images of the split train{', only ' + ' and '.join(there) if there else ''}.")
    kept = {0: _with_labels(rows[0], labels, f"{title}: ", remarks)}
    train_labeled = bool((labels[kept[0]] != NONE).all())
    dropped = []
    for split in (1, 2):
        if not len(rows[split]):
            continue
        has = labels[rows[split]] != NONE
        if train_labeled and not has.any():
            dropped.append(f"{len(rows[split]):,} images of {SPLITS[split]}")
            continue
        kept[split] = (
            _with_labels(rows[split], labels, f"{title}, {SPLITS[split]}: ", remarks) if train_labeled else rows[split]
        )
    if len(kept) == 1:
        train = kept[0]
        held = hold_out((key(int(row)) for row in train), holdout, len(train))
        if held.any():
            kept = {0: train[~held], 2: train[held]}
    if dropped:
        scored = "Scores are measured on held-out training images" if len(kept) > 1 else "Nothing is scored"
        remarks.append(f"{' and '.join(dropped)} have no labels and are not used. {scored}.")
    if not train_labeled:
        return [Part(chosen, None) for chosen in kept.values()], None
    classes, code = _classes(names, labels, kept, title, in_order)
    return [Part(chosen, torch.from_numpy(code[labels[chosen]])) for chosen in kept.values()], classes


def _with_labels(rows: np.ndarray, labels: np.ndarray, where: str, remarks: list[str]) -> np.ndarray:
    """Return the rows with labels, or all if many have none."""
    missing = labels[rows] == NONE
    count = int(missing.sum())
    if not count or count == len(rows):
        return rows
    if are_few(count, len(rows)):
        remarks.append(f"{where}{share(count, len(rows), 'images')} have no label, and are left out.")
        return rows[~missing]
    remarks.append(f"{where}{share(count, len(rows), 'images')} have no label, so no image has one.")
    labels[rows] = NONE
    return rows


def _classes(
    names: Sequence[str], labels: np.ndarray, kept: dict[int, np.ndarray], title: str, in_order: bool
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the classes in order, and the number of each of `names` among them (NONE if unused)."""
    code = np.full(len(names), NONE, dtype=np.int64)
    trained = np.unique(labels[kept[0]])
    if in_order:
        order = list(range(len(names)))
    else:
        numbers = all(name.lstrip("-").isdecimal() for name in names)
        order = sorted(trained.tolist(), key=lambda one: (int(names[one]), names[one]) if numbers else names[one])
    code[order] = np.arange(len(order))
    for split, rows in kept.items():
        if len(unknown := np.setdiff1d(np.unique(labels[rows]), trained)):
            raise DataError(
                f"{title}: images of {SPLITS[split]} have classes that no training image has: "
                f"{some([names[one] for one in unknown])} (those have {some([names[one] for one in order])})."
            )
    return tuple(names[one] for one in order), code
