"""What signals, and a trainer that ends, do to the loader's processes."""

import multiprocessing
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

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
    worker.join(timeout=10)
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
