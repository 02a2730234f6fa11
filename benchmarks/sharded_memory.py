"""Main memory of each of several CPU processes that train MAE under DDP and under trainer.strategy=fsdp2.

python benchmarks/sharded_memory.py [--model vit_large_patch16_224] [--depth 4] [--processes 4] [--updates 2] [--json FILE]

The model is cut to so many blocks, so that the processes fit in one machine; the width stays. Resident memory (VmHWM of
Linux, reset between the phases) less that of a process which has imported everything: while the method is built, set up and
sharded; in the updates; and while a checkpoint is written. Beside it what weights, gradients and AdamW's moments take: 16 bytes
a parameter.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from sslvision.backbones.build import build_backbone
from sslvision.methods.mae import MAE
from sslvision.training.trainer import build_trainer, fit, silence_lightning

PHASES = ("setup", "updates", "checkpoint")
OPTIMIZED = 16  # bytes per parameter in fp32: weight, gradient and AdamW's two moments


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_large_patch16_224", help="any timm ViT")
    parser.add_argument("--depth", type=int, default=4, help="blocks of the encoder")
    parser.add_argument("--decoder-depth", type=int, default=2)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1, help="images per process")
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the strategy, in a process of its own
    arguments = parser.parse_args()
    if arguments.worker:
        train(arguments)
        return
    figures = {strategy: measured(strategy, arguments) for strategy in arguments.strategies}
    report(figures, arguments)
    if arguments.json:
        setting = {**vars(arguments), "json": None, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"setting": setting, "figures": figures}, indent=2) + "\n")


def measured(strategy, arguments):
    """Return what each process says of its memory, in bytes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(arguments.processes), "NODE_RANK": "0"}
    line = [sys.executable, __file__, *sys.argv[1:], "--worker", strategy]
    with tempfile.TemporaryDirectory() as folder:
        common |= {"OMP_NUM_THREADS": "1", "FIGURES": folder}
        started = [
            subprocess.Popen(line, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(arguments.processes)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            sys.exit(f"{strategy}: a process has failed, see above")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(arguments.processes)]


def train(arguments):
    """Train a few updates, save a checkpoint, and write down the peak of each phase."""
    silence_lightning()
    warnings.filterwarnings("ignore", category=UserWarning)
    folder, figures = Path(os.environ["FIGURES"]), {"imported": resident("VmRSS")}
    reset_peak()
    method = MAE(
        build_backbone(arguments.model, image_size=224, depth=arguments.depth), decoder_depth=arguments.decoder_depth
    )
    figures["parameters"] = sum(parameter.numel() for parameter in method.parameters())
    images = torch.zeros(arguments.processes * arguments.batch * arguments.updates, 3, 256, 256, dtype=torch.uint8)
    trainer = build_trainer(
        folder=folder / "run",
        epochs=1,
        steps=arguments.updates,
        max_steps=arguments.updates,
        dry_run=False,
        timeout=600,
        loggers=[],
        callbacks=[Peaks(figures)],
        options={
            "accelerator": "cpu",
            "devices": arguments.processes,
            "strategy": arguments.worker,
            "precision": "32-true",
            "enable_progress_bar": False,
        },
    )
    loader = DataLoader(TensorDataset(images), batch_size=arguments.batch)
    fit(trainer, method, OneLoader(loader), checkpoint=None)
    figures["updates"] = resident("VmHWM")
    reset_peak()
    trainer.save_checkpoint(folder / "run" / "last.ckpt")
    figures["checkpoint"] = resident("VmHWM")
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(figures))


class OneLoader(LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader


class Peaks(Callback):
    """Note the peak before the first update."""

    def __init__(self, figures):
        self.figures = figures

    def on_train_start(self, trainer, pl_module):
        self.figures["setup"] = resident("VmHWM")
        reset_peak()


def resident(which):
    """Return the resident memory of this process in bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def report(figures, arguments):
    table = Table(
        title=f"MAE on {arguments.model}, {arguments.depth} blocks, {arguments.processes} CPU processes: MB a process"
    )
    for column in ("strategy", "states", *PHASES):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for strategy, processes in figures.items():
        states = OPTIMIZED * processes[0]["parameters"] / (arguments.processes if strategy == "fsdp2" else 1)
        row = [f"{states / 1e6:,.0f}"]
        for phase in PHASES:
            taken = sorted((one[phase] - one["imported"]) / 1e6 for one in processes)
            row.append(f"{taken[0]:,.0f}" if taken[-1] - taken[0] < 50 else f"{taken[0]:,.0f} to {taken[-1]:,.0f}")
        table.add_row(strategy, *row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
