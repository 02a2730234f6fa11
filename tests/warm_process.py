"""Commands in processes forked from one that has already imported what a run imports, which takes longer than a dry run."""

import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
# The server has one thread: it runs nothing, so that OpenMP may be used after a fork.
CONTEXT.set_forkserver_preload(
    [
        *("sslvision.cli.main", "sslvision.workflows.comparison", "sslvision.workflows.inspecting"),
        *("sslvision.workflows.predicting", "sslvision.workflows.embedding"),
        *("sslvision.workflows.pretraining", "matplotlib.backends.backend_agg", "matplotlib.figure", "wandb"),
    ]
)


def call_warm(name, words, *, cwd, log, timeout, environment):
    """Call the command `name` in a forked process. Return a CompletedProcess, as subprocess.run does."""
    streams = [Path(log) / stream for stream in ("stdout", "stderr")]
    process = CONTEXT.Process(target=_main, args=(name, [*words], str(cwd), streams, environment))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired([name, *words], timeout)
    return subprocess.CompletedProcess([name, *words], process.exitcode, *(stream.read_text() for stream in streams))


def run_warm(code, *, log, environment):
    """Run Python code in a forked process, and return what it prints. Of the package only what a run imports is imported."""
    streams = [Path(log) / stream for stream in ("stdout", "stderr")]
    process = CONTEXT.Process(target=_run, args=(code, streams, environment))
    process.start()
    process.join()
    assert process.exitcode == 0, streams[1].read_text()
    return streams[0].read_text()


def train_only(words, cwd, streams, environment):
    """Pretrain without all that comes after training, which takes most of a tiny run's time."""
    from sslvision.workflows import pretraining

    pretraining.conclude = lambda *arguments, **options: {}
    _main("pretrain", words, cwd, streams, environment)


def start_processes(target, arguments, log, number):
    """Call `target` in forked processes as ranks 0, 1, ..., and return what each said, once all have ended."""
    common = {**os.environ, "COLUMNS": "200", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    common["WORLD_SIZE"] = str(number)
    processes, streams = [], []
    for rank in range(number):
        (Path(log) / str(rank)).mkdir(parents=True, exist_ok=True)
        streams.append([Path(log) / str(rank) / name for name in ("stdout", "stderr")])
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        processes.append(CONTEXT.Process(target=target, args=(*arguments, streams[-1], environment)))
        processes[-1].start()
    for process in processes:
        process.join(600)
    said = ["".join(stream.read_text() for stream in of_rank) for of_rank in streams]
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * number, said
    return said


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def _run(code, streams, environment):
    _redirect(streams, environment)
    exec(code, {"__name__": "__main__"})


def _redirect(streams, environment):
    for handle, file in enumerate(streams, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
    os.environ.clear()
    os.environ.update(environment)


def _main(name, words, cwd, streams, environment):
    _redirect(streams, environment)
    os.chdir(cwd)
    sys.argv = [f"sslvision.{name}", *words]
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))

    from sslvision.cli.main import main

    main(name, words)
