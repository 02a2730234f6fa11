"""The arrows of the architecture: who may import whom, and what no file may do."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sslvision"
FILES = sorted(PACKAGE.rglob("*.py"))
ENTRY_POINTS = {"commandline.py", "help.py", "config.py"}
LOWEST = {"backbones", "views", "nn", "optim"}  # they import torch, timm, one another, and errors
MIDDLE = {"methods", "downstream", "data", "training"}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room(file):
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arrows_point_down(file):
    for name in imported(file):
        if not name.startswith("sslvision."):
            continue
        target = name.split(".")[1]
        if room(file) in LOWEST:
            assert target in LOWEST | {"errors"}, f"{file} imports {name}"
        elif room(file) in MIDDLE:
            assert target in LOWEST | MIDDLE | {"errors"}, f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_entry_points_know_hydra_and_there_is_one_lightning(file):
    roots = {name.split(".")[0] for name in imported(file)}
    if room(file) or file.name not in ENTRY_POINTS:
        assert not roots & {"hydra", "omegaconf"}
    assert not roots & {"lightning", "lightning_fabric"}


def test_methods_never_import_one_another_and_backbones_never_know_methods():
    for file in FILES:
        targets = {name for name in imported(file) if name.startswith("sslvision.methods")}
        if room(file) == "methods":
            assert targets <= {"sslvision.methods.base"}
        if room(file) in {"backbones", "data", "downstream"}:
            assert not targets


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_stays_under_300_lines_and_a_function_on_a_screen(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 75, f"{file.name}: {node.name}"


def test_there_is_no_room_for_odds_and_ends():
    assert not [
        file for file in FILES if {"utils", "common", "helpers"} & {part.removesuffix(".py") for part in file.parts}
    ]
