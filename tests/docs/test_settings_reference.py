"""docs/settings.md is what scripts/make_settings_reference.py makes today."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_settings_reference.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_settings_reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_reference_is_up_to_date(script):
    stale = "docs/settings.md is stale: run python scripts/make_settings_reference.py"
    assert script.FILE.read_text(encoding="utf-8") == script.make(), stale


def test_every_setting_has_a_description(script):
    rows = [line for line in script.make().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    for row in rows:
        *_, description, end = row.replace("\\|", "/").split("|")
        assert (len(description.strip()) > 3, end) == (True, ""), row


def test_a_description_may_span_lines_and_belong_to_several_settings(script):
    found = script.described(
        "Do it.\n\nArgs:\n    a, b: First\n        and second.\n    **c: Third.\n\nRaises:\n    X: y."
    )
    assert found == {"a": "First and second.", "b": "First and second.", "c": "Third."}
