"""How many processes the loader has, and what signals, and a trainer that ends, do to them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from sslvision.data import datamodule
from sslvision.data.source import Splits
from sslvision.data.workers import begin_worker


class Slow(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, number):
        time.sleep(0.01)
        return number


@pytest.fixture
def loader():
    loader = DataLoader(Slow(), num_workers=1, worker_init_fn=begin_worker)
    batches = iter(loader)
    next(batches)  # its process has begun
    yield batches, multiprocessing.active_children()[-1]
    batches._shutdown_workers()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_loader_goes_on_when_someone_else_signals_all_processes(loader, signum):
    batches, worker = loader
    subprocess.run(["kill", f"-{int(signum)}", str(worker.pid)], check=True)
    assert torch.cat(list(batches)).tolist() == list(range(1, 20))


def test_a_loader_ends_when_the_trainer_says_so(loader):
    _, worker = loader
    worker.terminate()  # SIGTERM
    worker.join(timeout=100)
    assert worker.exitcode == 0


BREAKS_OFF = """
import sys, time
from multiprocessing import resource_sharer
from multiprocessing.connection import SocketClient
from sslvision.data.workers import begin_worker

begin_worker(0)
SocketClient(resource_sharer.DupFd(1)._id[0]).close()
time.sleep(0.5)
raise ValueError("an error of ours")
"""


def test_a_loader_says_nothing_when_the_trainer_breaks_off_a_batch_but_tells_other_errors():
    said = subprocess.run([sys.executable, "-c", BREAKS_OFF], capture_output=True, text=True).stderr
    assert said.count("Traceback") == 1, said
    assert said.splitlines()[-1] == "ValueError: an error of ours"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(cores, quota, **environment): what a process is told of where it is."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)

    def make(cores, quota="max 100000", **environment):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(datamodule, "CGROUP", tmp_path / "cpu.max")
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))

    return make


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (3, 2), (4, 3), (16, 15), (128, 32)])
def test_there_are_as_many_workers_as_cores_but_one_that_trains(machine, cores, workers):
    machine(cores)
    assert datamodule.available_workers() == workers


def test_the_quota_of_a_container_counts(machine):
    machine(64, "400000 100000")
    assert (datamodule.available_cores(), datamodule.available_workers()) == (4, 3)
    machine(64, "50000 100000")
    assert datamodule.available_cores() == 1
    machine(2, "400000 100000")
    assert datamodule.available_cores() == 2
    datamodule.CGROUP.unlink()
    assert datamodule.available_cores() == 2


def test_processes_share_the_cores_of_a_machine(machine):
    machine(64)
    assert datamodule.available_workers(8) == 7
    machine(64, LOCAL_WORLD_SIZE=4)
    assert datamodule.available_workers() == 15
    assert datamodule.available_workers(4) == 15
    machine(4, LOCAL_WORLD_SIZE=8)
    assert datamodule.available_workers() == 1


def test_processes_that_slurm_started_have_cores_of_their_own(machine):
    machine(16, SLURM_NTASKS=8, SLURM_CPUS_PER_TASK=16)
    assert datamodule.available_workers(8) == 15
    machine(128, SLURM_NTASKS=8, SLURM_CPUS_PER_TASK=16)  # not bound to them
    assert datamodule.available_workers(8) == 15
    machine(16, SLURM_NTASKS=1, SLURM_CPUS_PER_TASK=16, LOCAL_WORLD_SIZE=8)  # one labeled that started torchrun
    assert datamodule.available_workers() == 2


def test_the_loader_of_a_trainer_counts_its_processes(machine):
    machine(16)
    data = datamodule.ImageData(Splits(Slow(), None), (), batch_size=1)
    assert data.workers == 15
    data.trainer = SimpleNamespace(num_devices=2)
    assert data.workers == 7
    assert datamodule.ImageData(Splits(Slow(), None), (), batch_size=1, workers=3).workers == 3
