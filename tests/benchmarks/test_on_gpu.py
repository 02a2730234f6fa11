"""The program for GPU machines: the lines of its README can be run, and a dry run on a CPU gets through every kind of part."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / "benchmarks" / "on_gpu" / "run.py"
SLOT = 600  # seconds that a command may take on such a machine
LINES = [
    line.strip()
    for line in (RUN.parent / "README.md").read_text().splitlines()
    if line.startswith("    python3 benchmarks/on_gpu/run.py")
]


@pytest.fixture
def program(monkeypatch):
    """The modules of the program, by name."""
    for folder in (ROOT / "benchmarks", ROOT):
        monkeypatch.syspath_prepend(str(folder))
    return lambda name: importlib.import_module(f"benchmarks.on_gpu.{name}")


def test_the_readme_has_lines_to_run():
    assert len(LINES) > 3


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_readme_parses_names_what_exists_and_fits(program, line):
    prepare = next(text for text in (RUN.parent / "README.md").read_text().splitlines() if "pip install" in text)
    assert len(f"{prepare.strip()}; {line}") < 2000
    arguments = program("run").parse(shlex.split(line)[2:])
    assert arguments.seconds < SLOT
    split_part, part = program("findings").split_part, program("part")
    names = {"bench": "contestants", "profile": "contestants", "checks": "checks"}
    limits = 0
    for text in arguments.parts:
        name, limit, words = split_part(text)
        limits += limit
        function = part.function_of(name)
        _, given = part.arguments_of(function, words)
        listed = given.get("who") or given.get("only") or ""
        if name in names and listed:
            module = program(names[name])
            known = getattr(module, "CONTESTANTS", None) or {check.split()[0] for check in module.CHECKS}
            assert {*listed.split(",")} <= {*known}
    assert limits <= SLOT


def test_parts_that_do_not_exist_are_refused_before_anything_runs(program, capsys):
    with pytest.raises(SystemExit):
        program("run").parse(["bensh:100"])
    assert "no such part" in capsys.readouterr().err


def test_a_report_has_ratios_mfu_and_commands_and_is_replaced_between_its_markers(program, tmp_path):
    report = program("report")
    text = "bench:100:method=dino:arch=vit_small_patch16_224:batch=64:who=run,lightly"
    row = {"ms": 32.0, "host_ms": 4.0, "img/s": 2000.0, "peak_GB": 8.0}
    found = {
        "flops": {"gflop_per_image": 100.0},
        "run": row,
        "lightly": row | {"img/s": 1000.0},
        "low": {"error": "a | b"},
    }
    setting = {"date": "2026-01-02", "card": "NVIDIA H100 80GB HBM3", "driver": "1", "python": "3.12", "versions": {}}
    summary = {
        "setting": setting,
        "parts": [{"part": text, "ended": "done", "seconds": 1}],
        "found": {"bench_dino_vit_small_patch16_224_64": found},
    }
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(summary))
    (about,) = report.merged([report.read(file)])
    section = report.section(**about)
    assert "| ours, as a run is | 2,000 | 2.00 | 32.0 | 4.0 | 20.2 | 8.0 |" in section
    assert "| lightly | 1,000 | 1.00 |" in section
    assert "a / b" in section
    assert "H100" in section
    assert f"`{text}`" in section
    once = report.placed("# Results\n\nOther.\n", section)
    assert report.placed(once, section) == once
    assert report.placed(once, "new").startswith(
        "# Results\n\nOther.\n\n<!-- on_gpu: begin -->\nnew\n<!-- on_gpu: end -->"
    )


def dry_run(program, parts, folder, seconds=1800):
    """Run parts at tiny sizes on a CPU, and return the summary: all ended well, and none of their findings is an error."""
    command = [sys.executable, RUN, "--dry", "--seconds", str(seconds), "--out", folder / "out"]
    environment = {**os.environ, "SCRATCH": str(folder / "scratch")}
    limited = []
    for text in parts:
        name, _, words = program("findings").split_part(text)
        limited.append(":".join([name, "300", *words]))
    done = subprocess.run([*command, *limited], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert [part for part in summary["parts"] if part["ended"] != "done"] == []
    assert len(summary["parts"]) == len(parts)
    errors = {f"{part}: {name}": value for part, found in summary["found"].items() for name, value in found.items()
              if isinstance(value, dict) and "error" in value}  # fmt: skip
    assert errors == {}
    return summary


@pytest.mark.e2e
def test_a_dry_run_gets_through_every_kind_of_part_with_all_contestants_and_checks(program, tmp_path):
    contestants = program("contestants")
    parts = [
        "env",
        "checks",
        "bench:who=" + ",".join(name for name in contestants.available(contestants.CONTESTANTS) if name != "max"),
        "bench:method=dino:arch=vit_small_patch16_224:batch=64:who="
        + ",".join(contestants.available(["bytes", "lightly"])),
        "profile:who=run",
        "micro",
        "loader",
        "trainer:recipes=mae_gpu",
        "recipe:mae_gpu:recipe=mae_gpu",
        "tests",
    ]
    assert {part.split(":")[0] for part in parts} == {*program("part").PARTS}
    summary = dry_run(program, parts, tmp_path)
    assert len(summary["found"]) == len(parts)
    assert {"log.txt", "files.tar.gz"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert "ours, as a run is" in program("report").section(**program("report").merged([summary])[0])


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_readme_runs_dry(program, line, tmp_path):
    dry_run(program, program("run").parse(shlex.split(line)[2:]).parts, tmp_path)
