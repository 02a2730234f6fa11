"""A real SLURM: jobs that reach their time limit, are signaled, requeued and cancelled, and a sweep as a job array.

It needs slurmctld, slurmd, the client commands and munged: apt-get install slurmctld slurmd slurm-client munge.
"""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from cluster import KILL_WAIT, Cluster, missing
from patient import UPDATE

from sslvision.cli import main as program
from sslvision.cli.recipes import PRETRAIN
from sslvision.system.torch_files import load_verified

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"SLURM is not installed: there is no {', '.join(missing())}"),
]

HERE = Path(__file__).parent
WORDS = ["method._target_=patient.PatientMAE"]
MANUAL = HERE.parents[1] / "docs" / "guide" / "devices.md"
# In the place of the resources of the manual's script, which these override.
OPTIONS = ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--signal=USR1@60", "--output=log"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.environment |= {
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "COLUMNS": "200",
            "WANDB_MODE": "offline",
        }
        yield cluster


@pytest.fixture(scope="module")
def words(tiny_settings):
    return ["recipe=mae", *tiny_settings("mae"), *WORDS]


@pytest.fixture(scope="module")
def undisturbed(run_tiny, tmp_path_factory):
    """The weights and metrics of the same run, outside of SLURM and without an interruption."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        run_tiny(folder, *WORDS)
    return folder


@pytest.fixture
def submit(cluster, words, tmp_path):
    """Submit the run as a job: submit() -> its number. It waits for a signal at an update."""

    def call(*options):
        (tmp_path / "waiting").unlink(missing_ok=True)
        command = shlex.join([sys.executable, "-m", "sslvision.pretrain", *words, "name=run", "resume=auto"])
        script = re.search(r"^#!/bin/bash\n.*?python -m ", MANUAL.read_text(), re.DOTALL | re.MULTILINE)[0]
        assert "--requeue" in script
        script = script.replace("--gres=gpu:8", "").removesuffix("python -m ") + command
        return cluster.submit(script, *OPTIONS, *options, cwd=tmp_path)

    return call


@pytest.fixture
def wait_at_update(cluster, tmp_path):
    """Wait until a job waits: nothing is to be done to it while Python is starting."""

    def wait(number):
        def waits():
            assert cluster.state(number) in ("PENDING", "RUNNING", "COMPLETING"), said(tmp_path)
            return (tmp_path / "waiting").exists()

        cluster.wait(waits, lambda: said(tmp_path))

    return wait


def said(folder):
    return (folder / "log").read_text() if (folder / "log").exists() else ""


def assert_ended_like(run, undisturbed):
    assert (run / "results.json").is_file()
    one, other = (load_verified(folder / "checkpoints" / "last.ckpt") for folder in (run, undisturbed))
    assert one["global_step"] == other["global_step"] == 8
    assert not [name for name, value in other["state_dict"].items() if not torch.equal(value, one["state_dict"][name])]
    assert (run / "metrics.csv").read_text() == (undisturbed / "metrics.csv").read_text()


def test_a_run_that_reaches_its_time_limit_is_saved_requeued_and_ends_as_if_nothing_had_been(
    cluster, submit, wait_at_update, undisturbed, tmp_path
):
    job = submit("--time=5")
    wait_at_update(job)
    cluster.wait_for_state(job, "COMPLETED")
    assert f"SIGUSR1: saved at step {UPDATE}" in said(tmp_path)
    assert f"SLURM has requeued job {job}" in said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    # More restarts if the machine is so busy that the first start comes to no update.
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert_ended_like(tmp_path / "outputs" / "run", undisturbed)


@pytest.mark.parametrize(
    ("asked", "name"), [(("scancel", "--signal=USR1"), "SIGUSR1"), (("scontrol", "requeue"), "SIGTERM")]
)
def test_a_run_that_is_sent_usr1_or_that_an_operator_requeues_is_saved_and_goes_on(
    asked, name, cluster, submit, wait_at_update, undisturbed, tmp_path
):
    job = submit("--time=600")
    wait_at_update(job)
    cluster.run(*asked, job)
    cluster.wait_for_state(job, "COMPLETED")
    assert f"{name}: saved at step {UPDATE}" in said(tmp_path)
    assert cluster.job(job)["Restarts"] == "1"
    assert_ended_like(tmp_path / "outputs" / "run", undisturbed)


def test_a_cancelled_run_is_saved_and_goes_on_when_it_is_submitted_again(
    cluster, submit, wait_at_update, undisturbed, tmp_path
):
    job = submit("--time=600")
    wait_at_update(job)
    cluster.run("scancel", job)
    cluster.wait_for_state(job, "CANCELLED")
    assert f"SIGTERM: saved at step {UPDATE}" in said(tmp_path)
    assert cluster.job(job)["Restarts"] == "0"
    again = submit("--time=600")
    cluster.wait_for_state(again, "COMPLETED")
    assert_ended_like(tmp_path / "outputs" / "run", undisturbed)


def test_a_run_that_is_killed_because_it_does_not_end_goes_on_from_its_last_checkpoint(
    cluster, submit, wait_at_update, undisturbed, tmp_path
):
    (tmp_path / "stubborn").touch()
    job = submit("--time=600")
    wait_at_update(job)
    cluster.run("scancel", job)
    cluster.wait_for_state(job, "CANCELLED")
    assert "saved at step" not in said(tmp_path), f"the update was to outlast KillWait, {KILL_WAIT} seconds"
    assert (
        load_verified(tmp_path / "outputs" / "run" / "checkpoints" / "last.ckpt")["global_step"] == UPDATE - 1
    )  # of the end of an epoch
    (tmp_path / "go").touch()
    again = submit("--time=600")
    cluster.wait_for_state(again, "COMPLETED")
    assert_ended_like(tmp_path / "outputs" / "run", undisturbed)


def test_a_sweep_is_a_job_array_whose_runs_are_requeued_by_themselves(
    cluster, command, words, wait_at_update, undisturbed, tmp_path
):
    pytest.importorskip("submitit")
    jobs = ["slurm.time=10h", "slurm.signal_seconds=60", "slurm.cpus=1", "slurm.at_once=1"]
    done = command("-m", *words, "mask_ratio=0.75,0.5", "name=masks", *jobs, cwd=tmp_path, **cluster.environment)
    assert done.returncode == 0, done.stderr
    number = done.stdout.split("job array ")[1].split(":")[0]
    first, second = f"{number}_0", f"{number}_1"
    assert "mask_ratio=0.5" in next(line for line in done.stdout.splitlines() if second in line)

    wait_at_update(first)
    assert cluster.job(second)["JobState"] == "PENDING"
    cluster.run("scancel", "--signal=USR1", first)
    for job in (first, second):
        cluster.wait_for_state(job, "COMPLETED")
    log = (tmp_path / "outputs" / "slurm-jobs" / f"{first}_0_log.out").read_text()
    assert f"SIGUSR1: saved at step {UPDATE}" in log
    assert f"SLURM has requeued job {first}" in log
    assert [cluster.job(job)["Restarts"] for job in (first, second)] == ["1", "0"]
    assert_ended_like(tmp_path / "outputs" / "masks-0", undisturbed)
    assert load_verified(tmp_path / "outputs" / "masks-1" / "checkpoints" / "last.ckpt")["global_step"] == 8


def test_what_slurm_does_not_take_is_told_in_its_words(cluster, words, monkeypatch, tmp_path, capsys):
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(HERE)
    code = program._run_all(PRETRAIN, [*words, "name=run", "slurm.time=1h", "slurm.partition=nowhere"])
    assert code == 2
    assert re.search(r"SLURM does not take the job: .*invalid partition specified: nowhere", capsys.readouterr().err)
    assert cluster.run("squeue", "--noheader", "--state=all", "--name=pretrain-run") == ""
