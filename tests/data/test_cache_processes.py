"""Caches that several processes open at once, that are killed while they build one, or that were damaged since."""

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from caches import KINDS, built

from sslvision.data import cache as cache_module
from sslvision.data import cache_build
from sslvision.data.sources.folder import FileSource, open_folder
from sslvision.errors import DataError

SCRIPT = """
import sys, time
from sslvision.data import cache
from sslvision.data.sources import folder
from sslvision.data.source import Splits

def slow(self, index, read=folder.FileSource.read):
    print("decoding", flush=True)
    time.sleep(float(sys.argv[4]))
    return read(self, index)

folder.FileSource.read = slow
cache._memory_folder = lambda: cache.Path(sys.argv[2])
splits = folder.open_folder(sys.argv[1], holdout=0)
kept = cache.cached(splits, sys.argv[3], side=48, folder=sys.argv[2], workers=0).train
print("sum", sum(int(kept.read(index).sum()) for index in range(len(kept))), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def process(photos, cache_of):
    """Return a function that opens the cache in a process of its own, which ends when its input does."""
    started = []

    def start(kind="disk", seconds=0.0):
        words = [sys.executable, "-c", SCRIPT, str(photos), str(cache_of.root), kind, str(seconds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(words, **pipes))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def until(process, word):
    """Return the lines that a process prints before one with a word in it, and that line."""
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if word in line:
            return lines
    raise AssertionError(f"it ended without {word}")


def fork(work):
    """Do some work in a child of this process, and return its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a child has not the others
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_it_is_built_a_cache_is_built_again_and_nothing_is_left_over(photos, cache_of, kind):
    source, read, decoded = open_folder(photos, holdout=0).train, FileSource.read, []

    def dies(self, index):
        decoded.append(index)
        if len(decoded) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    def build():
        FileSource.read = dies
        cache_of(source, kind)

    assert os.waitpid(fork(build), 0)[1] == signal.SIGKILL
    (part,) = built(cache_of.root)
    assert ".part" in part
    kept = cache_of(source, kind)
    assert built(cache_of.root) == [kept.folder.name]
    assert kept.read(0).numel()


def test_of_two_processes_one_builds_and_both_read(photos, cache_of, tmp_path, monkeypatch):
    source, read, log = open_folder(photos, holdout=0).train, FileSource.read, tmp_path / "log"

    def slow(self, index):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.1)
        return read(self, index)

    monkeypatch.setattr(FileSource, "read", slow)
    child = fork(lambda: (tmp_path / "sum").write_text(total(cache_of(source))))
    while not log.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it decoded"
        time.sleep(0.01)
    here = total(cache_of(source))
    assert os.waitpid(child, 0)[1] == 0
    assert log.read_text().split() == [str(child)] * 7
    assert (tmp_path / "sum").read_text() == here
    assert len(built(cache_of.root)) == 1


def total(source):
    return str(sum(int(source.read(index).sum()) for index in range(len(source))))


def test_without_locks_the_process_that_builds_last_takes_what_is_there(photos, cache_of, monkeypatch):
    source, reserve = open_folder(photos, holdout=0).train, cache_build._reserve
    monkeypatch.setattr(cache_module, "fcntl", None)

    def meanwhile(*settings):
        monkeypatch.setattr(cache_build, "_reserve", reserve)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            other.setattr(cache_build.shutil, "rmtree", lambda *_, **__: None)  # it began a little later
            meanwhile.built = cache_of(source)
        reserve(*settings)

    monkeypatch.setattr(cache_build, "_reserve", meanwhile)
    kept = cache_of(source)
    assert kept.folder == meanwhile.built.folder
    assert built(cache_of.root) == [kept.folder.name]
    assert torch.equal(kept.read(0), meanwhile.built.read(0))


@pytest.mark.e2e
@pytest.mark.skipif(cache_module.fcntl is None, reason="no locks here")
def test_shared_memory_is_free_again_when_its_last_user_has_gone(photos, cache_of, process):
    one, other = process("ram"), process("ram")
    until(one, "sum"), until(other, "sum")
    one.communicate("")
    assert len(built(cache_of.root)) == 1
    other.communicate("")
    assert built(cache_of.root) == []


@pytest.mark.e2e
@pytest.mark.skipif(cache_module.fcntl is None, reason="no locks here")
def test_of_two_processes_that_find_no_cache_one_builds_and_both_use_it(photos, cache_of, process, monkeypatch):
    """Where the one that comes second to the lock waited to have it alone, it waited until the first one's run was over."""
    take, quicker = cache_module._take, []

    def late(lock, **words):
        if not quicker:
            cache_module.fcntl.flock(lock, cache_module.fcntl.LOCK_UN)
            quicker.append(process("ram"))
            until(quicker[0], "sum")  # it uses the cache now, for as long as it lives
        return take(lock, **words)

    monkeypatch.setattr(cache_module, "_take", late)
    kept = cache_of(open_folder(photos, holdout=0).train, "ram")
    assert built(cache_of.root) == [kept.folder.name]


@pytest.mark.e2e
@pytest.mark.skipif(cache_module.fcntl is None, reason="no locks here")
def test_what_a_killed_process_left_in_shared_memory_is_freed_by_the_next(photos, cache_of, process):
    one = process("ram")
    until(one, "sum")
    one.kill()
    one.wait()
    (left,) = built(cache_of.root)
    kept = cache_of(open_folder(photos, holdout=0).train, "ram", side=40)
    assert built(cache_of.root) == [kept.folder.name] != [left]


def test_a_damaged_cache_is_named(photos, cache_of):
    source = open_folder(photos, holdout=0).train
    folder = cache_of(source).folder
    os.truncate(folder / "pixels", 100)
    with pytest.raises(DataError, match=r"damaged: 100 bytes instead of .* Delete that folder"):
        cache_of(source)


def test_a_cache_that_fails_while_it_is_built_leaves_nothing(photos, cache_of, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_build, "_reserve", full)
    with pytest.raises(OSError, match="No space left"):
        cache_of(open_folder(photos, holdout=0).train)
    assert built(cache_of.root) == []
