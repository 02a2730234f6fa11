"""Contestants in a process set up as their library sets it up: one process set up anew for each turn, or one for each.

Ours chooses torch's kernels and the C library's allocator for the training it is about to do (configure_torch of
sslvision/training/trainer.py); the others leave both as they are.
"""

import contextlib
import ctypes
import multiprocessing
import os
import platform

import torch
from measure import autocast, timed
from peers import PEERS, Ours
from resident import resident, settings_of

from sslvision.system.allocator import M_MMAP_MAX, M_TOP_PAD, M_TRIM_THRESHOLD
from sslvision.training.trainer import configure_torch

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def set_up_for(contestant):
    """Set this process up as the contestant's library does. All memory that is free goes back, so let it make a step first."""
    kind = contestant.views[0].device.type
    if isinstance(contestant, Ours):
        configure_torch({"cuda": "gpu"}.get(kind, kind))
        return
    torch.set_float32_matmul_precision("high" if kind == "cuda" else "highest")
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 65_536)
        # Where glibc's own thresholds, which follow what a program frees, can get to at most.
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        libc.mallopt(M_TOP_PAD, 128 << 10)
        libc.malloc_trim(0)


def race_apart(arguments, overrides, entries):
    """Return ms per step of every round for each of `entries`: name -> (peer or None for ours, its options)."""
    context, lines = multiprocessing.get_context("spawn"), {}
    with contextlib.ExitStack() as ends:
        for name, entry in entries.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=take_turns, args=(theirs, arguments, overrides, *entry), daemon=True)
            process.start()
            ends.callback(process.join)
            ends.callback(ours.send, 0)
            lines[name] = ours
            ours.recv()  # it is warm; the next one starts when this one has nothing to do
        times = {name: [] for name in lines}
        for number in range(arguments.rounds):
            order = [*lines][number % len(lines) :] + [*lines][: number % len(lines)]
            for name in order if number % 2 else order[::-1]:
                lines[name].send(arguments.steps)
                times[name].append(lines[name].recv())
    return times


def take_turns(line, arguments, overrides, peer, options):
    """Answer every number of steps with the ms that one took; 0 ends it."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if peer is None:
        configure_torch({"cuda": "gpu"}.get(device.type, device.type))
    method, _, views = resident(settings_of(arguments, os.devnull, overrides), device)
    if peer is None:
        contestant = Ours("ours", method, views, **options)
    else:
        contestant = PEERS[peer, type(method)](peer, method, views, arch=arguments.arch, **options)
    contestant.choose_layers()
    precision = autocast(device, arguments.precision)
    timed(contestant, precision, 2)
    line.send("warm")
    while steps := line.recv():
        line.send(timed(contestant, precision, steps))
