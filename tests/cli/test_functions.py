"""The public API: what can be imported, and the commands as functions."""

import importlib
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sslvision
from sslvision.cli import functions
from sslvision.cli.compose import compose_settings, compose_values
from sslvision.cli.recipes import COMMANDS, FINETUNE, PRETRAIN
from sslvision.errors import DataError, UsageError

TINY = {
    "backbone": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8},
    "method": {"decoder_embed_dim": 16, "decoder_num_heads": 2, "warmup_epochs": 0},
    "trainer": {"enable_progress_bar": False, "accelerator": "cpu"},
}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("name", sslvision.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name):
    found = getattr(sslvision, name)
    assert callable(found)
    assert found.__doc__
    assert name in dir(sslvision)


def test_importing_the_package_imports_nothing_else():
    loaded = run_python(
        "import sys; import sslvision; print([m for m in sys.modules if m.startswith(('torch', 'hydra'))])"
    )
    assert loaded.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sslvision.nothing


def test_the_public_names_are_sorted_and_each_has_a_home():
    assert set(sslvision.__all__) == set(sslvision._HOMES)


@pytest.mark.e2e
def test_a_commands_module_is_its_function_too(warm_python):
    """`import sslvision.pretrain` puts the module where the function was."""
    code = f"""
import importlib, inspect, sslvision
for name in {[*COMMANDS]}:
    function = getattr(sslvision, name)
    assert inspect.isfunction(function)
    module = importlib.import_module(f"sslvision.{{name}}")
    assert getattr(sslvision, name) is module is not function
    for call in (function, module):
        try:
            call("nothing", "images") if name in ("predict", "search", "segment") else call("nothing")
        except Exception as error:
            print(name, type(error).__name__)
"""
    found = [line.split() for line in warm_python(code).splitlines()]
    assert [name for name, _ in found] == [name for name in COMMANDS for _ in range(2)]
    assert {error for _, error in found} <= {"UsageError", "DataError"}
    for name in COMMANDS:
        assert isinstance(importlib.import_module(f"sslvision.{name}"), functions.CallableModule)


def test_values_are_taken_as_they_are_and_sections_may_be_dictionaries(tmp_path):
    given = {"recipe": "mae", "epochs": 2, "data": "folder", "data.root": tmp_path / "2024_01", "mask_ratio": 0.6}
    given |= {"method": {"crop_scale": (0.5, 1)}, "backbone": {"depth": 2}}
    run = compose_values({**given, "name": "1e3 ${x}"}, PRETRAIN)
    settings = run.settings
    assert (settings.epochs, settings.name, settings.data["root"]) == (2, "1e3 ${x}", str(tmp_path / "2024_01"))
    assert (settings.method["mask_ratio"], settings.method["crop_scale"]) == (0.6, (0.5, 1.0))
    assert settings.backbone["depth"] == 2
    assert settings.data["_target_"].endswith("open_folder")
    assert run.recipe == "mae"
    words = [word for word in run.words if not word.startswith("name=")]
    assert compose_settings([*words, "name=x"]).method == settings.method


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ration": 0.5}, "Did you mean method.mask_ratio"),
        ({"epochs": "2"}, "epochs=2 is not a whole number"),
        ({"method": {"mask_ratio": "0.5"}}, "mask_ratio=0.5 is not a number"),
        ({"data": "foldr"}, "Did you mean data=folder"),
        ({"data": 3}, "data is chosen by name"),
        ({"data.root": "a", "data": {"root": "b"}}, "data.root is given twice"),
        ({"mask_ratio": 0.5, "method": {"mask_ratio": 0.6}}, "method.mask_ratio is given twice"),
        ({"trainer": {"callbacks": [object()]}}, "settings are numbers, strings, booleans"),
        ({"recipe": "mea"}, "Did you mean recipe=mae"),
    ],
)
def test_what_is_wrong_is_the_exception_of_the_command_line(settings, message):
    with pytest.raises(UsageError, match=message):
        sslvision.pretrain(**{"recipe": "mae", **settings})


@pytest.mark.e2e
def test_pretrain_probe_finetune_and_predict_from_a_notebook_leave_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = _state()
    results = sslvision.pretrain("mae", batch_size=2500, dry_run=True, name="a", knn_every_epochs=0, **TINY)
    run = Path("outputs/a-dry-run")
    assert results["loss"] > 0
    assert (run / "results.json").is_file()
    assert "recipe=mae" in (run / "README.md").read_text()
    assert sslvision.load_backbone(str(run)).backbone.embed_dim == 32
    scores = sslvision.probe(run, train_images=200, pixels=False, device="cpu")
    assert scores
    tuned = sslvision.finetune(run, data="digits", dry_run=True, scratch=False, name="b", trainer=TINY["trainer"])
    assert isinstance(tuned, dict)
    from PIL import Image

    Image.new("L", (32, 32)).save("one.png")
    csv = sslvision.predict("outputs/b-dry-run", "one.png", device="cpu", workers=0)
    assert csv.read_text().count("\n") == 2
    with pytest.raises(DataError, match="fewer than one batch"):
        sslvision.pretrain("mae", batch_size=20_000, dry_run=True, name="c", **TINY)
    assert _state() == before
    assert compose_values({"run": run, "data": "digits"}, FINETUNE).settings.compare is False


def _state():
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    return (
        dict(os.environ),
        [signal.getsignal(getattr(signal, name)) for name in names],
        list(warnings.filters),
        sys.argv,
    )


def test_the_example_of_the_functions_is_right(monkeypatch):
    """The calls in the docstrings of the package and of functions.py compose."""
    calls = []
    monkeypatch.setattr(functions, "_call", lambda command, settings: calls.append((command, settings)) or {})
    for text in (functions.__doc__, sslvision.__doc__):
        lines = [line.strip() for line in text.splitlines() if line.startswith("    ") and "sslvision" in line]
        lines = [line for line in lines if "load_backbone" not in line]
        namespace = {}
        exec("\n".join(lines), namespace)
    assert len(calls) == 3
    for command, settings in calls:
        if command is PRETRAIN:
            assert compose_values(settings, command).settings.data["root"] == "photos"
