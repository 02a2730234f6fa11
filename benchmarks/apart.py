"""Contestants in processes of their own that take turns: each process as its library starts it.

In one process all share what the first of them sets: torch's kernels, the C library's allocator. Ours sets both for the
training it is about to do (sslvision/training/trainer.py, choose_kernels); the others leave them to torch.
"""

import contextlib
import multiprocessing
import os

import torch
from measure import autocast, timed
from peers import PEERS, Ours

from sslvision.training.trainer import choose_kernels


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
    from throughput import compose, resident  # which imports this file

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if peer is None:
        choose_kernels({"cuda": "gpu"}.get(device.type, device.type))
    method, _, views = resident(compose(arguments, os.devnull, overrides), device)
    if peer is None:
        contestant = Ours("ours", method, views, **options)
    else:
        contestant = PEERS[peer, type(method)](peer, method, views, arch=arguments.arch, **options)
    precision = autocast(device, arguments.precision)
    timed(contestant, precision, 2)
    line.send("warm")
    while steps := line.recv():
        line.send(timed(contestant, precision, steps))
