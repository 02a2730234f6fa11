"""What the README and the manual show can be done: Python blocks run, commands compose, and example files train."""

import dataclasses
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sslvision.cli.compose import compose_runs, compose_settings
from sslvision.cli.recipes import COMMANDS
from sslvision.cli.slurm_settings import slurm_jobs
from sslvision.cli.words import as_settings, split_words

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = ROOT / "docs" / "examples"
OWN_METHOD = ROOT / "tests" / "own_method"  # run by tests/test_own_method.py; the manual shows its files


def blocks(page, language):
    """Return the code blocks of a page in a language, but for those below a comment `not run: why`."""
    found = re.findall(rf"(<!-- not run: [^\n]*-->\n)?^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)
    return [code for skipped, code in found if not skipped]


def commands(page):
    """Return the command lines of sslvision on a page: the command's name and its words."""
    for block in blocks(page, "(?:bash)?"):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.search(r"(?:python -m sslvision\.|sslvision )(\w+)\b(.*)", line):
                yield found[1], shlex.split(found[2], comments=True)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Work in a folder where the runs are that the pages speak of, and modules of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(OWN_METHOD)
    shutil.copy(OWN_METHOD / "simsiam.yaml", tmp_path)
    for name in ("mae", "dino", "a", "first", "photos", "classifier"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        settings = dataclasses.asdict(compose_settings(["recipe=mae"]))
        (tmp_path / "outputs" / name / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_every_command_shown_is_accepted(workplace):
    seen = 0
    for page in PAGES:
        for name, words in commands(page):
            split = split_words(as_settings(words, COMMANDS[name].words))
            if not split.help:
                assert compose_runs(split, COMMANDS[name]), (page.name, name, words)
                assert not split.slurm or slurm_jobs(split.slurm)
            seen += 1
    assert seen > 40


@pytest.mark.e2e
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks(page, "python")), {"__name__": page.stem})


def test_a_metric_a_callback_and_an_optimizer_of_ones_own_train(workplace, monkeypatch, train_tiny):
    """One run of all three example classes."""
    (workplace / "combined.py").write_text(
        "from my_methods import MAEWithLogger, MAEWithRMSE, MAEWithSGD\n"
        "class Combined(MAEWithRMSE, MAEWithLogger, MAEWithSGD):\n"
        "    used = []\n"
        "    def after_update(self, clock):\n"
        "        self.used.append(self.optimizers().optimizer)\n"
    )
    monkeypatch.syspath_prepend(workplace)
    train_tiny(
        workplace / "run",
        "method._target_=combined.Combined",
        "json_lines=metrics.jsonl",
        "epochs=1",
        "warmup_epochs=0",
    )

    lines = [json.loads(line) for line in (workplace / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["rmse"] ** 2 == pytest.approx(line["loss"], rel=1e-3) for line in lines)
    assert ",rmse," in (workplace / "run" / "metrics.csv").read_text().splitlines()[0]

    optimizer = sys.modules["combined"].Combined.used[-1]
    assert type(optimizer) is torch.optim.SGD
    scheduled, _, constant, _ = optimizer.param_groups
    assert constant["lr"] == 0.01 != scheduled["lr"]
