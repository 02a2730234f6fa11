"""The settings of SLURM, and what is refused before anything is submitted. tests/slurm has a cluster."""

import re
import sys

import pytest

from sslvision.cli import main as program
from sslvision.cli import slurm_array
from sslvision.cli.recipes import COMMANDS
from sslvision.cli.slurm_settings import slurm_jobs
from sslvision.cli.words import split_words
from sslvision.errors import UsageError


def jobs(*words):
    return slurm_jobs(split_words(words).slurm)


def test_settings_of_slurm_are_read_by_their_types_and_leave_those_of_the_run_alone():
    words = split_words(
        ["recipe=mae", "slurm.time=90m", "slurm.cpus=4", "slurm.memory_gb=1.5", "slurm.setup=module load cuda"]
    )
    assert words.settings == {"recipe": "mae"}
    read = slurm_jobs(words.slurm)
    assert (read.seconds, read.cpus, read.memory_gb, read.setup) == (5400, 4, 1.5, "module load cuda")
    read = jobs(
        "slurm.time=2d", "slurm.sbatch.constraint=a100", "slurm.sbatch.exclusive=true", "slurm.sbatch.mail_type=END"
    )
    assert read.sbatch == {"constraint": "a100", "exclusive": True, "mail-type": "END"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["slurm.gpus=1"], r"slurm\.time is not given: say slurm\.time=2h"),
        (["slurm.time=10:00:00"], r"slurm\.time=10:00:00 must be a time above 0, such as 90m, 24h or 3d"),
        (["slurm.time=1h", "slurm.tme=2h"], r"no setting slurm\.tme\. Did you mean slurm\.time\?"),
        (["slurm.time=1h", "slurm.constraint=a100"], r"Any other option of sbatch is slurm\.sbatch\.OPTION=VALUE"),
        (
            ["slurm.time=1h", "slurm.sbatch.signal=USR2@10"],
            r"slurm\.sbatch\.signal is set by sslvision; use slurm\.signal_seconds",
        ),
        (["slurm.time=1h", "slurm.sbatch.cpus_per_task=4"], r"use slurm\.cpus"),
        (["slurm.time=4m"], r"signal_seconds=300 is no less than the time limit, slurm\.time=4m"),
        (["slurm.time=1h", "slurm.gpus=two"], r"slurm\.gpus=two is not a whole number"),
        (["slurm.time=1h", "slurm.cpus=0"], r"slurm\.cpus=0 must be more than 0"),
        (["slurm.time=1h", "slurm.time=2h"], r"slurm\.time is given twice"),
        (["slurm.time=1h", "~slurm.gpus"], "nothing to remove"),
    ],
)
def test_settings_of_slurm_that_cannot_be_are_refused(words, told):
    with pytest.raises(UsageError, match=told):
        jobs(*words)


class Executor:
    """submitit's, without a SLURM: keeps what it is given."""

    def __init__(self, folder):
        self.folder, self.parameters, self.lines = folder, {}, []

    def update_parameters(self, **parameters):
        self.parameters = parameters


@pytest.fixture
def submitted(monkeypatch, tmp_path):
    """Submit a command line: submitted("pretrain", "recipe=mae", ...) -> exit code, and what submitit was given."""
    monkeypatch.chdir(tmp_path)
    made = []

    def executor(folder):
        made.append(Executor(folder))
        return made[-1]

    def submit(executor, name, lines):
        executor.lines = lines
        return [f"7_{number}" for number in range(len(lines))]

    monkeypatch.setattr(slurm_array, "_executor", executor)
    monkeypatch.setattr(slurm_array, "_submitted", submit)

    def call(name, *words):
        made.clear()
        code = program._run_all(COMMANDS[name], list(words))
        return code, made[0] if made else None

    return call


def test_the_runs_of_a_sweep_become_jobs_that_resume_in_folders_of_their_own(submitted, tmp_path, capsys):
    words = ["-m", "recipe=mae", "mask_ratio=0.5,0.75", "name=masks", "trainer.devices=4", "trainer.num_nodes=2"]
    code, made = submitted("pretrain", *words, "slurm.time=90m", "slurm.gpus=4", "slurm.cpus=8", "slurm.memory_gb=0.5")
    assert code == 0
    common = ["trainer.devices=4", "trainer.num_nodes=2"]
    assert made.lines == [
        ["recipe=mae", f"mask_ratio={ratio}", *common, f"output_dir={tmp_path}/outputs/masks-{number}", "resume=auto"]
        for number, ratio in enumerate((0.5, 0.75))
    ]
    assert made.folder == tmp_path / "outputs" / "slurm-jobs"
    asked = {
        key: made.parameters[key] for key in ("time", "nodes", "ntasks_per_node", "gpus_per_node", "mem", "job_name")
    }
    assert asked == {
        **{
            "time": 90,
            "nodes": 2,
            "ntasks_per_node": 4,
            "gpus_per_node": 4,
            "mem": "512M",
            "job_name": "pretrain-masks",
        }
    }
    assert made.parameters["srun_args"] == ["--kill-on-bad-exit=1", "--cpus-per-task=8"]
    assert made.parameters["additional_parameters"] == {"signal": "USR1@300", "requeue": True}
    told = capsys.readouterr().out
    assert (
        "Submitted 2 runs as job array 7: 2 x 4 processes, 8 cores each, 4 GPUs on each node, time limit 90m." in told
    )
    assert f"7_1  {tmp_path}/outputs/masks-1  mask_ratio=0.75\n" in told
    assert not (tmp_path / "outputs").exists()


def test_a_run_without_a_name_gets_its_folder_when_it_is_submitted(submitted):
    _, made = submitted("pretrain", "recipe=mae", "slurm.time=1h")
    ((*_, folder, resume),) = made.lines
    assert folder.startswith("output_dir=/")
    assert "/outputs/mae-20" in folder
    assert resume == "resume=auto"


def test_a_command_that_goes_on_by_itself_is_not_told_to_resume(submitted, tmp_path):
    _, made = submitted("scale", "recipe=mae", "budget=10m", "slurm.time=1h")
    assert made.lines == [["recipe=mae", "budget=10m", f"output_dir={tmp_path}/outputs/scale-mae-embedded"]]


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("pretrain", ["recipe=mae", "overwrite=true"], "overwrite=true would delete what a run has done"),
        (
            "pretrain",
            ["recipe=mae", "name=a", "resume=a.ckpt"],
            r"resume=a\.ckpt: jobs resume from their own run folder",
        ),
        ("pretrain", ["recipe=mae", "name=used"], r"used is in use: resume what is there with resume=auto"),
        ("pretrain", ["recipe=mae", "slurm.gpus=8"], r"slurm\.gpus=8 without trainer\.devices.*add trainer\.devices=8"),
        ("pretrain", ["recipe=mae", "trainer.devices=auto"], r"trainer\.devices=auto: .*Say trainer\.devices=8"),
        ("pretrain", ["-m", "recipe=mae", "trainer.devices=1,2"], "differ in trainer.devices"),
        (
            "pretrain",
            ["recipe=mae", "data=webdataset", "data.urls=https://a:hunter2secret@b/{0..1}.tar"],
            "is a secret",
        ),
        ("predict", ["run=a", "images=b"], "sslvision predict has no run folder, and submits no jobs"),
    ],
)
def test_a_run_that_cannot_be_a_job_is_refused_before_anything_is_submitted(
    name, words, told, submitted, tmp_path, capsys
):
    (tmp_path / "outputs" / "used").mkdir(parents=True)
    (tmp_path / "outputs" / "used" / "config.yaml").touch()
    code, made = submitted(name, *words, "slurm.time=1h")
    assert code == 2
    assert made is None
    assert re.search(told, capsys.readouterr().err)


def test_a_folder_in_use_goes_on_if_that_is_asked_for(submitted, tmp_path):
    (tmp_path / "outputs" / "used").mkdir(parents=True)
    (tmp_path / "outputs" / "used" / "config.yaml").touch()
    code, made = submitted("pretrain", "recipe=mae", "name=used", "resume=auto", "slurm.time=1h")
    assert code == 0
    assert made.lines[0][-2:] == [f"output_dir={tmp_path}/outputs/used", "resume=auto"]


def test_without_submitit_or_slurm_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    if slurm_array.importlib.util.find_spec("submitit") is not None:
        with pytest.raises(UsageError, match=r"no SLURM here .*login node"):
            slurm_array._executor(tmp_path)
    monkeypatch.setattr(slurm_array.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs submitit.*pip install 'sslvision\[slurm\]'"):
        slurm_array._executor(tmp_path)


def test_a_job_runs_the_command_line_where_it_was_submitted_and_has_its_exit_code(monkeypatch, tmp_path):
    seen = []

    def ended(code):
        def main(name, words):
            seen.append((name, words, sys.argv, slurm_array.os.getcwd()))
            raise SystemExit(code)

        return main

    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "argv", ["submitit"])
    monkeypatch.setattr(program, "main", ended(0))
    assert slurm_array.run_job("pretrain", ["a=b"], str(tmp_path)) is None
    assert seen == [("pretrain", ["a=b"], ["sslvision.pretrain", "a=b"], str(tmp_path))]
    monkeypatch.setattr(program, "main", ended(143))
    with pytest.raises(SystemExit) as end:
        slurm_array.run_job("pretrain", ["a=b"], str(tmp_path))
    assert end.value.code == 143


def test_only_commands_with_run_folders_show_the_settings_of_slurm():
    kinds = {name: slurm_array.runs_under_slurm(command.kind) for name, command in COMMANDS.items()}
    assert [kinds[name] for name in ("pretrain", "finetune", "scale", "embed")] == [True] * 4
    assert not any(kinds[name] for name in ("predict", "report", "search", "pack"))
