"""The peak of memory that dry_run=plan computes, beside the one measured in training: on CPU processes, or on a GPU.

python benchmarks/plan_memory.py [CASE ...] [--processes 1 2] [--json FILE]
python benchmarks/plan_memory.py --words recipe=mae data=digits ... [--processes 2]

Each case trains three updates in processes of its own, by the Trainer of sslvision, after three updates of a tiny method that
load what is loaded once. On a CPU the peak is the most resident memory (VmHWM of /proc, Linux only) less what was resident
before the method was built; the C library gives freed memory back at once (MALLOC_MMAP_THRESHOLD_, MALLOC_ARENA_MAX), which
training does not ask of it, as that is slow. On a GPU it is torch.cuda.max_memory_allocated, blocks not compiled.
"""

import argparse
import gc
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import warnings
from pathlib import Path

COMMON = [
    "data=digits",
    "data.channels=3",
    "knn_every_epochs=0",
    "compile=false",
    "cuda_graphs=false",
    "optimizer=adamw",
]
MAE = ["recipe=mae", *COMMON, "decoder_embed_dim=256", "decoder_depth=2", "decoder_num_heads=8"]
DINO = ["recipe=dino", *COMMON, "hidden=1024", "prototypes=16384", "local_crops=2"]
VIT = ["backbone.name=vit_base_patch16_224", "backbone.patch_size=16", "backbone.image_size=96", "backbone.mlp_ratio=4"]
VIT += ["backbone.embed_dim=768", "backbone.num_heads=12"]
SWIN = ["backbone.name=swin_small_patch4_window7_224", "backbone.image_size=64", "backbone.window_size=2"]
SWIN += [
    "backbone.patch_size=4",
    "backbone.depths=[2,2,12,2]",
    "backbone.embed_dim=96",
    "backbone.num_heads=[3,6,12,24]",
]
CASES = {
    "mae-vit": [*MAE, *VIT, "backbone.depth=8", "batch_size=32"],
    "mae-vit-recomputed": [*MAE, *VIT, "backbone.depth=8", "batch_size=64", "activation_checkpointing=true"],
    # Blocks as wide as those of ViT-L/16, of which four fit into main memory four times.
    "mae-vit-large": [
        *(*MAE, *VIT[1:-2], "backbone.name=vit_large_patch16_224", "backbone.embed_dim=1024", "backbone.num_heads=16"),
        *("backbone.depth=4", "batch_size=32"),
    ],
    "dino-vit": [*DINO, *VIT, "backbone.depth=5", "local_size=48", "batch_size=8"],
    "mae-swin": [*MAE, *SWIN, "batch_size=32"],
    "dino-swin": [*DINO, *SWIN, "local_size=32", "batch_size=8"],
}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
TINY = ["recipe=mae", *COMMON, "backbone.depth=1", "batch_size=8", "backbone.patch_size=8"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[*CASES], help=", ".join(CASES))
    parser.add_argument("--words", nargs="+", help="settings of pretrain, instead of cases")
    parser.add_argument("--processes", nargs="+", type=int, default=[1], help="1; with 2 or more, under DDP and FSDP2")
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not MALLOC.items() <= os.environ.items():  # read when a program starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    import sslvision.workflows.planning  # noqa: F401  # once, for all processes that are forked

    cases = {"given": arguments.words} if arguments.words else {name: CASES[name] for name in arguments.cases}
    found = []
    for name, words in cases.items():
        for processes in arguments.processes:
            for strategy in arguments.strategies if processes > 1 else ["auto"]:
                figures = compare(words, processes, strategy)
                found.append({"case": name, "processes": processes, "strategy": strategy, **figures})
                shown = f"{name:20} {processes} x {strategy:6} planned {figures['planned'] / 1e6:8.0f} MB, measured "
                print(shown + f"{figures['measured'] / 1e6:8.0f} MB: {100 * figures['deviation']:+.1f} %", flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def compare(words, processes, strategy):
    """Return the peak that is planned for a process, the most that one of them had, and the deviation of the plan."""
    words = [*words, f"trainer.devices={processes}", f"trainer.strategy={strategy}"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results, running = context.SimpleQueue(), []
    for rank in range(processes):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"} if processes > 1 else {}
        running.append(context.Process(target=measure, args=(words, rank, environment, results)))
        running[-1].start()
    for process in running:
        process.join()
    if any(process.exitcode for process in running):
        raise SystemExit(f"A process failed: {' '.join(words)}")
    measured = dict(results.get() for _ in running)
    planned, most = measured[0][0], max(peak for _, peak in measured.values())
    by = [measured[rank][1] for rank in sorted(measured)]
    return {"planned": planned, "measured": most, "deviation": planned / most - 1, "by_process": by}


def measure(words, rank, environment, results):
    """Put (rank, (what is planned in the first process, the peak of this one)) into the queue."""
    import torch
    from timm.layers import set_fused_attn

    from sslvision.cli.compose import compose_settings
    from sslvision.training.trainer import silence_lightning

    os.environ.update(environment)
    on_gpu = torch.cuda.is_available()
    silence_lightning()
    warnings.simplefilter("ignore")
    precision = "bf16-mixed" if on_gpu else "32-true"
    device = ["trainer.accelerator=gpu" if on_gpu else "trainer.accelerator=cpu", f"trainer.precision={precision}"]
    settings = compose_settings([*words, *device])
    set_fused_attn(on_gpu)
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    planned_bytes = planned(settings) if rank == 0 else 0
    train(compose_settings([*TINY, *device, *(word for word in words if word.startswith("trainer."))]))
    before = reset(on_gpu)
    train(settings)
    results.put((rank, (planned_bytes, peak(on_gpu) - before)))


def planned(settings):
    """Return the peak of dry_run=plan, without the alternatives that it shows beside."""
    from sslvision.inspection.device_memory import memory_of
    from sslvision.inspection.fake_update import measure_optimizer
    from sslvision.workflows import planning

    world = planning.world_of(settings)
    sharded, recomputed = world.strategy == "fsdp2", settings.activation_checkpointing
    method = planning.prepare(settings, world, sharded=sharded, recomputed=recomputed)
    optimizer = measure_optimizer(method, device=world.device)
    of = memory_of(
        method,
        world.strategy,
        world.devices,
        accumulate=world.accumulate,
        steps=planning.measure(method, world),
        optimizer=optimizer,
        low=world.precision == "bf16-mixed",
    )
    return of.peak(world.images)


def train(settings):
    """Train three updates, without checkpoints and evaluation."""
    from sslvision.training.trainer import build_trainer, configure_for, fit
    from sslvision.workflows.method import method_from_settings
    from sslvision.workflows.pretraining import open_data

    settings.data["workers"] = 0
    method = method_from_settings(settings)
    data = open_data(settings, method)
    options = {**settings.trainer, "enable_checkpointing": False, "enable_progress_bar": False}
    with tempfile.TemporaryDirectory() as folder:
        about = {"folder": Path(folder), "loggers": [], "callbacks": [], "dry_run": False}
        trainer = build_trainer(epochs=1, steps=3, max_steps=3, options=options, **about)
        configure_for(trainer, method, compile=settings.compile, cuda_graphs=settings.cuda_graphs)
        fit(trainer, method, data, checkpoint=None)


def reset(on_gpu):
    """Begin a new peak, and return the bytes that are there."""
    import torch

    gc.collect()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(on_gpu):
    """Return the most bytes since `reset`."""
    import torch

    return torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")


def resident(key):
    """Return bytes of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
