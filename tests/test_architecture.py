"""The architecture: who may import whom, where things are, and how long a file may be."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sslvision"
FILES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = ["pretrain", "probe", "segment", "finetune", "predict", "inspect", "scale", "tune", "export", "report"]
COMMANDS += ["embed", "search", "duplicates", "outliers", "select", "cluster", "pack"]
# A folder imports those below it, and its own files.
LAYERS = [
    {"__init__", "__main__", *COMMANDS},
    {"cli"},
    {"workflows"},
    {"training"},
    {"exports"},
    {"runs"},
    {"evaluation", "inspection", "embeddings"},
    {"methods"},
    {"backbones"},
    {"data"},
    {"augment"},
    {"nn", "optim", "figures"},
    {"system", "settings"},
    {"errors"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def folder_of(file):
    relative = file.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def test_arrows_point_down():
    for file in FILES:
        for name in imported(file):
            if name.startswith("sslvision."):
                own, target = folder_of(file), name.split(".")[1]
                below = LEVEL[target] > LEVEL[own] or target == own
                assert below or (own == "optim" and target == "nn"), f"{file} imports {name}"


def test_every_file_directly_in_the_package_is_a_command():
    found = {file.name for file in PACKAGE.glob("*.py")}
    assert found == {f"{one}.py" for one in ("__init__", "__main__", "errors", "settings", *COMMANDS)}


def test_only_the_command_line_knows_hydra_and_there_is_one_lightning():
    for file in FILES:
        roots = {name.split(".")[0] for name in imported(file)}
        assert folder_of(file) == "cli" or not roots & {"hydra", "omegaconf"}, file
        assert not roots & {"lightning", "lightning_fabric"}, file


def test_methods_never_import_one_another():
    own = {"mae": {"mae"}, "dino": {"dino"}, "supervised": {"supervised"}}
    for file in FILES:
        if folder_of(file) == "methods":
            for name in imported(file):
                if name.startswith("sslvision.methods."):
                    method = name.split(".")[2].split("_")[0]
                    assert method in {"base", "clock", "lightning", "rebuild"} | own.get(
                        file.stem.split("_")[0], set()
                    ), f"{file}: {name}"


def test_a_file_is_at_most_400_lines_and_a_function_fits_on_a_screen():
    for file in FILES:
        text = file.read_text()
        assert len(text.splitlines()) <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 75, f"{file}: {node.name}"


def test_no_two_modules_have_the_same_name_and_none_is_for_odds_and_ends():
    names = [file.stem for file in FILES if file.stem != "__init__"]
    assert sorted(names) == sorted(set(names))
    assert not {"utils", "common", "helpers", "misc"} & {part for file in FILES for part in file.parts}
