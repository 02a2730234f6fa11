from io import StringIO
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from rich.console import Console

from sslvision.evaluation.confidence import Scores
from sslvision.figures.label_efficiency import Cell
from sslvision.workflows.console import classes_in_words, print_classifiers, print_comparison, print_configuration

BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


def console(width: int = 120, *, color: bool = False) -> Console:
    return Console(file=StringIO(), width=width, force_terminal=color, color_system="standard" if color else None)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, StringIO)
    return [line.strip() for line in console.file.getvalue().splitlines() if line.strip()]


def cell(arm: str, labels: int | Literal["all"], mean: float, *, seeds: int = 3) -> Cell:
    tested = {"test_images": 1000, "low": mean - 3, "high": mean + 3}
    return Cell(arm=arm, labels_per_class=labels, images=100, mean=mean, deviation=0.44, seeds=seeds, **tested)


def test_the_probe_table_has_a_line_for_each_classifier() -> None:
    per_class = torch.tensor([50.0, float("nan"), 70.0])
    scores = Scores(61.23, 99.0, (58.04, 64.96), per_class, torch.zeros(3, 3, dtype=torch.int64))
    out = console(80)
    print_classifiers(out, {"k-NN, k = 10": scores, "linear probe": scores}, "How good?")
    title, head, _, first, second = lines(out)
    assert title == "How good?"
    assert " ".join(head.split()) == "classifier top-1 % 95 % interval top-5 % mean per class %"
    assert first.startswith("k-NN, k = 10 ")
    assert second.removeprefix("linear probe").split() == ["61.2", "58.0", "to", "65.0", "99.0", "60.0"]


def test_the_comparison_has_arms_as_rows_and_labels_in_their_order_as_columns() -> None:
    cells = [
        cell("from scratch", "all", 90.0, seeds=1),
        cell("from scratch", 10, 50.06),
        cell("from scratch", 2, 30.0),
        cell("full", 2, 40.0),
        cell("full", "all", 95.0, seeds=1),
    ]
    out = console()
    print_comparison(out, cells, "What labels buy")
    title, _, head, _, scratch, full = lines(out)
    assert title == "What labels buy"
    assert head.split() == ["per", "class", "2", "10", "all"]
    assert scratch.removeprefix("from scratch").split() == ["30.0", "±", "0.4", "50.1", "±", "0.4", "90.0"]
    assert full.removeprefix("full").split() == ["40.0", "±", "0.4", "–", "95.0"]


def test_classes_are_counted_and_the_first_are_named() -> None:
    source = SimpleNamespace(labels=torch.tensor([0, 5]), classes=("ant", "bee", "cat", "dog", "eel", "fox"))
    assert classes_in_words(source) == "6 classes: ant, bee, cat, dog and 2 more"
    source.classes = None
    assert classes_in_words(source) == "6 classes"
    source.labels = None
    assert classes_in_words(source) == "no labels"


def test_the_best_arm_of_each_column_is_bold_and_equals_both() -> None:
    cells = [
        *(cell(arm, 1, mean) for arm, mean in (("from scratch", 20.0), ("partial", 40.31), ("full", 40.29))),
        *(cell(arm, 5, mean) for arm, mean in (("from scratch", 60.0), ("partial", 50.0), ("full", 55.0))),
    ]
    out = console(color=True)
    print_comparison(out, cells, "")
    scratch, partial, full = lines(out)[-3:]
    assert f"{BOLD}60.0 ± 0.4{PLAIN}" in scratch
    assert f"{BOLD}40.3 ± 0.4{PLAIN}" in partial
    assert f"{BOLD}40.3 ± 0.4{PLAIN}" in full
    assert scratch.count(BOLD) == partial.count(BOLD) == full.count(BOLD) == 1


@pytest.mark.parametrize("width", [80, 120])
def test_six_columns_of_labels_fit_a_terminal_of_80(width: int) -> None:
    columns: list[int | Literal["all"]] = [1, 2, 5, 10, 50, "all"]
    out = console(width)
    print_comparison(out, [cell("frozen features", labels, 81.23) for labels in columns], "digits")
    text = "\n".join(lines(out))
    assert text.count("81.2 ± 0.4") == 6
    assert "…" not in text


def test_names_in_brackets_are_printed_as_they_are() -> None:
    out = console()
    print_configuration(out, {"data": "photos [old] (3 + 1): [bold], [/]"}, title="a")
    assert "photos [old] (3 + 1): [bold], [/]" in "\n".join(lines(out))
