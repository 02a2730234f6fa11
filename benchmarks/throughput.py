"""Images per second of our training step and of other libraries', in one process, round by round in changing order.

python benchmarks/throughput.py --method mae|dino [--arch vit_small_patch16_224] [--peers hf,lightly] [key=value ...]

Needs `pip install -e ".[bench]"`. Recipe keys (key=value) change ours, and the peers take their sizes and weights from ours.
Before anything is timed all must give the paper's loss and gradients on the same images and masks. Three levels:

1. The step on data that lie on the device: forward, backward, optimizer, teacher. Peers get ready-made views; ours is timed
   with those, for the comparison, and from bytes with its own augmentation, for what a run will do. "Ours" is compiled, and
   captured as CUDA graphs, where a run would be. All share one process, and our choice of torch's kernels and of the C
   library's allocator is lent to the peers. "turns" sets the process up anew for each turn, as the contestant's own library
   does; "apart" has each in a process of its own: what people get.
2. The loader alone.
3. End to end, JPEG files through our Trainer.
"""

import argparse
import contextlib
import copy
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path

import torch
from apart import race_apart, set_up_for
from measure import autocast, datasheet, host_syncs, matrix_product, peak_memory, phases, quickest, race
from peers import PEERS, Ours
from reference import gate, reference_flops, same_loss
from resident import resident, settings_of
from rich.console import Console
from rich.table import Table
from whole_run import draw_photographs, loader_level, trainer_level

from sslvision.backbones.vit import ViT
from sslvision.methods.mae import MAE
from sslvision.training.trainer import configure_torch, select_device, silence_lightning

BATCH = {"mae": 16, "dino": 4}


def main():
    arguments, overrides = read_arguments()
    warnings.filterwarnings("ignore")
    silence_lightning()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = select_device(arguments.device)
    arguments.device = device.type
    accelerator = {"cuda": "gpu"}.get(device.type, device.type)
    configure_torch(accelerator)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.data or draw_photographs(Path(scratch) / "images", max(64, 4 * arguments.batch))
        settings = settings_of(arguments, folder, overrides)
        figures = {"setting": setting_of(arguments, device, overrides)}
        if "step" in arguments.levels:
            figures |= step_level(settings, arguments, overrides, device)
        figures["loader"] = loader_level(settings, arguments) if "loader" in arguments.levels else None
        if "trainer" in arguments.levels:
            figures["trainer"] = trainer_level(settings, arguments, accelerator, Path(scratch) / "run")
    report(figures)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"All figures: {arguments.json}")


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("mae", "dino"), required=True)
    parser.add_argument("--arch", default="vit_small_patch16_224", help="a ViT or Swin of timm")
    parser.add_argument("--peers", default="hf,lightly", help="those that have the method are taken; '' for none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's own choice")
    parser.add_argument("--batch", type=int, help="images; default: 16 (mae), 4 (dino)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of each contestant in a round")
    parser.add_argument("--trainer-steps", type=int, default=30)
    parser.add_argument("--levels", default="step,turns,apart,loader,trainer")
    parser.add_argument("--data", help="a folder of images for levels 2 and 3; default: 500x400 JPEGs drawn for it")
    parser.add_argument("--json", type=Path, help="where to; default: outputs/throughput_....json")
    arguments, overrides = parser.parse_known_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be 2 or more: one round has no quartiles")
    arguments.batch = arguments.batch or BATCH[arguments.method]
    arguments.levels = arguments.levels.split(",")
    name = f"throughput_{arguments.method}_{arguments.arch}_{arguments.device}_{arguments.precision}.json"
    arguments.json = arguments.json or Path("outputs") / name
    return arguments, overrides


def step_level(settings, arguments, overrides, device):
    """Return what one step costs each contestant."""
    method, batch, views = resident(settings, device)
    on_gpu = device.type == "cuda"
    ours = [Ours("ours", method, views, compiled=settings.compile, captured=settings.cuda_graphs)]
    if on_gpu:
        ours += [Ours("ours, eager", copy.deepcopy(method), views, compiled=False, captured=False)]
    peers = {}
    for peer in filter(None, arguments.peers.split(",")):
        build = PEERS.get((peer, type(method)))
        if build is None or (isinstance(method, MAE) and not isinstance(method.backbone, ViT)):
            continue  # it has no such method, and MAE on ViTs alone
        shipped = {"fused_attention": True, "fused_adamw": peer == "hf", "joined": False}
        peers[f"{peer} as shipped"] = [build(f"{peer} as shipped", method, views, arch=arguments.arch, **shipped)]
        peers[f"{peer} best"] = [
            build(f"{peer} best", method, views, arch=arguments.arch, fused_attention=fused, compiled=compile_it)
            for fused, compile_it in itertools.product((True, False), (False, True) if on_gpu else (False,))
        ]
    everyone = [*ours, *itertools.chain(*peers.values())]
    choose = [contestant.choose_layers for contestant in everyone]
    if on_gpu:  # compiled after the formulas are checked, or the two images of the check would cost each a compilation
        checked = gate(method, everyone, views)
    for choose_layers in choose:
        choose_layers()
    if not on_gpu:
        checked = gate(method, everyone, views)
    precision = autocast(device, arguments.precision)
    same_loss(everyone, precision)
    ours += [Ours("ours, from bytes", method, views, batch=batch)]
    chosen = ours + [quickest(candidates, precision) for candidates in peers.values()]
    del peers
    rounds = race(chosen, precision, rounds=arguments.rounds, steps=arguments.steps)
    parts = phases(chosen, precision)
    flops = reference_flops(method, views)
    multiplied = matrix_product(device, precision)
    rows = compared(rounds, settings.batch_size)
    for contestant in chosen:
        per_second = rows[contestant.name]["images_per_second"]
        rows[contestant.name] |= {
            "phases_ms": parts[contestant.name],
            "peak_mb": peak_memory(contestant, precision),
            "host_syncs": host_syncs(contestant, precision),
            "tflops": per_second * flops / 1e12,
            "mfu_of_datasheet": per_second * flops / peak if (peak := datasheet(device, arguments.precision)) else None,
            "mfu_of_matrix_product": per_second * flops / multiplied,
            "settings": contestant.chosen,
        }
    found = {"gate": checked, "gflop_per_image": flops / 1e9, "matrix_product_tflops": multiplied / 1e12, "step": rows}
    if "turns" in arguments.levels:
        rounds = race(chosen, precision, rounds=arguments.rounds, steps=arguments.steps, before=set_up_for)
        found["turns"] = compared(rounds, settings.batch_size)
    if "apart" in arguments.levels:
        entries = {"ours": (None, ours[0].chosen)} | {
            name: (name.split()[0], {**rows[name]["settings"]}) for name in rows if not name.startswith("ours")
        }
        found["apart"] = compared(race_apart(arguments, overrides, entries), settings.batch_size)
    return found


def compared(rounds, batch_size):
    """Return what the ms of every round tell of each contestant, and of it against ours, round by round."""
    rows = {}
    for name, times in rounds.items():
        ratios = sorted(theirs / own for theirs, own in zip(times, rounds["ours"], strict=True))
        rows[name] = {
            "ms_min": min(times),
            "ms_median": statistics.median(times),
            "ms": times,
            "images_per_second": 1e3 * batch_size / statistics.median(times),
            "times_ours": {"median": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4)[::2]},
        }
    return rows


# What is said.


def setting_of(arguments, device, overrides):
    """Return what the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    libraries = ("torch", "timm", "pytorch-lightning", "transformers", "lightly")
    return {
        "method": arguments.method,
        "arch": arguments.arch,
        "batch": arguments.batch,
        "precision": arguments.precision,
        "overrides": overrides,
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {library: version(library) for library in libraries},
        "date": time.strftime("%Y-%m-%d"),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def version(library):
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def processor():
    """Return the processor's name and the cores this process may use."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        return f"{name}, {len(os.sched_getaffinity(0))} cores"
    return platform.processor()


def report(figures):
    """Print tables, and which level limits a run."""
    console, setting = Console(width=170), figures["setting"]
    console.print(
        f"[bold]{setting['method']} {setting['arch']}, {setting['batch']} images, {setting['precision']}[/], "
        f"{setting['device']}, {setting['threads']} threads, "
        + ", ".join(f"{name} {number}" for name, number in setting["versions"].items() if number)
    )
    if (setting["load_before"] or 0) > 0.5:
        console.print(f"[yellow]Other work was on the machine (load {setting['load_before']:.1f}): rough figures.[/]")
    rates = {}
    if "step" in figures:
        print_gate(console, figures["gate"])
        print_steps(console, figures)
        print_ratios(console, "turns", figures.get("turns", {}))
        print_ratios(console, "apart", figures.get("apart", {}))
        rates["the step, from bytes"] = figures["step"]["ours, from bytes"]["images_per_second"]
    if figures.get("loader"):
        rates["the loader alone"] = figures["loader"]["images_per_second"]
    if figures.get("trainer"):
        rates["through the Trainer, from files"] = figures["trainer"]["images_per_second"]
    for name, rate in rates.items():
        console.print(f"{name}: {rate:,.1f} images/s")
    parts = {name: rate for name, rate in rates.items() if "Trainer" not in name}
    if len(parts) > 1:
        console.print(f"What limits a run: {min(parts, key=parts.get)}.")


def print_gate(console, gate_figures):
    table = Table(title="Equal before the race (fp32)", title_justify="left")
    for column in ("", "loss", "gradient norm", "trained parameters"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in gate_figures.items():
        cells = (f"{values['loss']:.6f}", f"{values['gradient_norm']:.5f}", f"{values['trained_parameters']:,}")
        table.add_row(name, *cells)
    console.print(table)


def print_steps(console, figures):
    table = Table(
        title=f"One step: {figures['gflop_per_image']:.1f} GFLOP an image by the paper's formula; a matrix product runs at "
        f"{figures['matrix_product_tflops']:.3g} TFLOP/s",
        title_justify="left",
    )
    phase_names = ("views", "forward", "backward", "optimizer", "teacher")
    last = ("MB", "host syncs", "MFU %", "of a product %")
    for column in ("", "ms min", "median", "images/s", "ms / ours [quartiles]", *phase_names, *last):
        table.add_column(column, justify="right" if column else "left")

    def shown(value, pattern="{:.1f}", scale=1):
        return "n/a" if value is None else pattern.format(scale * value)

    for name, row in figures["step"].items():
        low, high = row["times_ours"]["quartiles"]
        table.add_row(
            name,
            f"{row['ms_min']:.1f}",
            f"{row['ms_median']:.1f}",
            f"{row['images_per_second']:,.1f}",
            f"{row['times_ours']['median']:.3f} [{low:.3f}, {high:.3f}]",
            *(f"{row['phases_ms'][phase]:.1f}" for phase in phase_names),
            shown(row["peak_mb"], "{:.0f}"),
            shown(row["host_syncs"], "{}"),
            shown(row["mfu_of_datasheet"], scale=100),
            shown(row["mfu_of_matrix_product"], scale=100),
        )
    console.print(table)


def print_ratios(console, level, rows):
    for name, row in rows.items():
        low, high = row["times_ours"]["quartiles"]
        console.print(
            f"{level}, {name}: {row['images_per_second']:,.1f} images/s, median {row['ms_median']:.1f} ms, "
            f"{row['times_ours']['median']:.3f} [{low:.3f}, {high:.3f}] times ours"
        )


if __name__ == "__main__":
    main()
