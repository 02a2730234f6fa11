"""Whatever benchmarks, scripts and examples import from the package, or from a file beside them, exists."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(file for folder in ("benchmarks", "scripts") for file in (ROOT / folder).rglob("*.py"))


def imported(tree):
    """Yield (module, name) of every `from module import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module, alias.name) for alias in node.names)


def defined(file):
    """Return the names that a file binds at its top level."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.ClassDef):
                names.add(inner.name)
            elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                names.add(inner.id)
            elif isinstance(inner, ast.alias):
                names.add((inner.asname or inner.name).split(".")[0])
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_imported_name_exists(file):
    missing = []
    for module, name in imported(ast.parse(file.read_text(encoding="utf-8"))):
        if module.split(".")[0] == "sslvision":
            found = importlib.import_module(module)
            exists = hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}") is not None
        else:
            beside = [ROOT / "benchmarks" / f"{module}.py", ROOT / Path(*module.split(".")).with_suffix(".py")]
            own = next((one for one in beside if one.is_file()), None)
            exists = own is None or name in defined(own)
        if not exists:
            missing.append(f"{module}.{name}")
    assert missing == []
