"""Commands in processes forked from one that has already imported what a run imports, which takes longer than a dry run."""

import multiprocessing
import os
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
