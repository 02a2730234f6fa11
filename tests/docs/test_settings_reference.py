"""docs/settings.md is what scripts/make_settings_reference.py makes today."""

import importlib.util
import re
from pathlib import Path

import pytest

from sslvision.cli.check_settings import known_keys, parameters
from sslvision.data.sources.embedded import open_embedded
from sslvision.settings import Finetune, Pretrain

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


def keys_below(text, heading):
    part = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)`", part, re.MULTILINE))


def test_every_key_that_a_command_accepts_is_listed(script):
    text = script.make()
    embedded = {"_target_": "sslvision.data.sources.embedded.open_embedded"}
    for method, heading in (("mae.MAE", "MAE"), ("dino.DINO", "DINO")):
        known = known_keys({"method": {"_target_": f"sslvision.methods.{method}"}, "data": embedded}, Pretrain)
        assert keys_below(text, heading) == known["method"].keys() - {None}
    known = known_keys({"data": embedded}, Finetune)
    assert keys_below(text, "Supervised") == known["method"].keys() - {None}
    assert keys_below(text, "All data sources") == known["data"].keys() - parameters(open_embedded).keys()


def test_a_description_may_span_lines_and_belong_to_several_settings(script):
    found = script.described(
        "Do it.\n\nArgs:\n    a, b: First\n        and second.\n    **c: Third.\n\nRaises:\n    X: y."
    )
    assert found == {"a": "First and second.", "b": "First and second.", "c": "Third."}
