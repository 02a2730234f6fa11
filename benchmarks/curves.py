"""What a training step costs, against image size, batch and model size: ViT and Swin, dense (DINO) and masked (MAE).

python benchmarks/curves.py [--device cpu|cuda] [--compile] [--rounds 5] [--out benchmarks/cost_curves]

A step is losses, gradients, AdamW and the teacher, from normalized views that are already there. Points take turns, round by
round, so that what else happens on the machine falls on all of them; shown are medians. DINO has 2 crops of the image size
and 8 of half of it, MAE hides three quarters. Memory: on a GPU the peak of a step above weights and optimizer, on a CPU what
autograd keeps for the backward pass. Writes OUT.png and OUT.json; `--draw` draws OUT.json again.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import matplotlib
import torch
from memory import kept
from rich.progress import track

from sslvision.backbones.build import build_backbone
from sslvision.methods.base import Clock
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.training.trainer import configure_method, configure_torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

SWIN = {"name": "swin_tiny_patch4_window7_224", "window_size": 8}
MODELS = {
    "ViT-Ti": {"name": "vit_tiny_patch16_224"},
    "ViT-S": {"name": "vit_small_patch16_224"},
    "ViT-B": {"name": "vit_base_patch16_224"},
    "ViT-L": {"name": "vit_large_patch16_224"},
    "Swin-48": {**SWIN, "embed_dim": 48},  # half as wide as Swin-T
    "Swin-72": {**SWIN, "embed_dim": 72},
    "Swin-T": SWIN,
    "Swin-S": {**SWIN, "name": "swin_small_patch4_window7_224"},
    "Swin-B": {**SWIN, "name": "swin_base_patch4_window7_224"},
    "Swin-L": {**SWIN, "name": "swin_large_patch4_window7_224"},
}
# Sides are multiples of 64, so that a quarter of a Swin's units is a whole number.
GRIDS = {
    "cpu": {
        "size": [64, 128, 192, 256],
        "batch": [1, 2, 4, 8],
        "model": {"ViT": ["ViT-Ti", "ViT-S"], "Swin": ["Swin-48", "Swin-72", "Swin-T"]},
        "usual": {"size": 128, "batch": 2, "ViT": "ViT-Ti", "Swin": "Swin-48"},
        "mae": {"decoder_embed_dim": 192, "decoder_depth": 4, "decoder_num_heads": 6},
        "dino": {"prototypes": 4096},
    },
    "cuda": {
        "size": [128, 192, 256, 320, 384],
        "batch": [16, 32, 64, 128],
        "model": {"ViT": ["ViT-S", "ViT-B", "ViT-L"], "Swin": ["Swin-T", "Swin-S", "Swin-B"]},
        "usual": {"size": 256, "batch": 64, "ViT": "ViT-S", "Swin": "Swin-T"},
        "mae": {},
        "dino": {},
    },
}
METHODS = {"MAE": "masked", "DINO": "dense"}


def main():
    # All points' shapes at once are more than oneDNN keeps; a training run has few. Read when it is first used.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=GRIDS)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/cost_curves"))
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw OUT.json")
    arguments = parser.parse_args()
    file = arguments.out.with_suffix(".json")
    if not arguments.draw:
        configure_torch(arguments.device)
        file.write_text(json.dumps(measure(arguments), indent=1) + "\n")
    draw(json.loads(file.read_text())).savefig(arguments.out.with_suffix(".png"), dpi=130)


def points(grid):
    """Yield (axis, value, kind, model, size, batch), each once per axis it belongs to."""
    usual = grid["usual"]
    for kind in ("ViT", "Swin"):
        for size in grid["size"]:
            yield "size", kind, usual[kind], size, usual["batch"]
        for batch in grid["batch"]:
            yield "batch", kind, usual[kind], usual["size"], batch
        for model in grid["model"][kind]:
            yield "model", kind, model, usual["size"], usual["batch"]


def measure(arguments):
    """Return the setting and, for each point, ms of every round, memory and parameters."""
    device, grid = torch.device(arguments.device), GRIDS[arguments.device]
    cells = {(method, *about) for _, *about in points(grid) for method in METHODS}
    runs = {}
    for cell in track(sorted(cells), description="building, first steps"):
        runs[cell] = Run(*cell, device=device, grid=grid)
        configure_method(runs[cell].method, device, compile=bool(arguments.compile))
        runs[cell].timed()
    for number in track(range(arguments.rounds), description="measuring"):
        for cell in sorted(runs, reverse=number % 2 == 1):
            runs[cell].ms.append(runs[cell].timed())
    rows = []
    for axis, kind, model, size, batch in points(grid):
        for method in METHODS:
            run = runs[method, kind, model, size, batch]
            if run.memory is None:
                run.memory = kept(run.method, run.views, device) / 1e6
            row = {"axis": axis, "method": method, "kind": kind, "model": model, "size": size, "batch": batch}
            millions = sum(p.numel() for p in run.method.pretrained().parameters()) / 1e6
            rows.append({**row, "parameters_m": millions, "ms": run.ms, "memory_mb": run.memory})
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    setting = {"device": device.type, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    setting |= {"date": time.strftime("%Y-%m-%d"), "rounds": arguments.rounds, "compiled": arguments.compile}
    return {"setting": setting, "usual": grid["usual"], "mae": grid["mae"], "dino": grid["dino"], "points": rows}


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


class Run:
    """A method with its views and its optimizer."""

    def __init__(self, method, kind, model, size, batch, *, device, grid):
        torch.manual_seed(0)
        backbone = build_backbone(**MODELS[model], image_size=size, drop_path_rate=0.1)
        if method == "MAE":
            self.method = MAE(backbone, **grid["mae"])
        else:
            self.method = DINO(backbone, local_size=size // 2, **grid["dino"])
        self.method.to(device).train()
        self.views = [torch.randn(batch, 3, crop.size, crop.size, device=device) for crop in self.method.crops]
        if method == "MAE":
            self.views.append(torch.rand(batch, backbone.grid[0] * backbone.grid[1], device=device))
        self.optimizer, self.device = self.method.configure_optimizers(), device
        self.ms, self.memory = [], None

    def timed(self):
        """Return ms of a step."""
        on_gpu, clock, before = self.device.type == "cuda", Clock(10, 100, 5), 0
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu):
            loss = self.method.losses(self.views, clock)["loss"]
        loss.backward()
        self.method.prepare_update(self.optimizer, clock)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_update(clock)
        if on_gpu:
            torch.cuda.synchronize()
            self.memory = (torch.cuda.max_memory_allocated() - before) / 1e6
        return 1e3 * (time.perf_counter() - start)


# The picture.

COLOURS = {"ViT": "#1f5fa8", "Swin": "#d1620a"}
AXES = {
    "size": "side of the images (pixels)",
    "batch": "images in a batch",
    "model": "parameters of the backbone (millions)",
}


def draw(figures):
    """Return the figure: a row for each measure, a column for each axis."""
    setting, usual = figures["setting"], figures["usual"]
    on_gpu = setting["device"] == "cuda"
    measures = {
        "time of a step (ms)": lambda row: statistics.median(row["ms"]),
        "images per second": lambda row: 1e3 * row["batch"] / statistics.median(row["ms"]),
        ("peak memory of a step (MB)" if on_gpu else "kept for backward (MB)"): lambda row: row["memory_mb"],
    }
    figure, panels = plt.subplots(3, 3, figsize=(11.5, 9.5), sharex="col", sharey="row", layout="constrained")
    for column, axis in enumerate(AXES):
        rows = [row for row in figures["points"] if row["axis"] == axis]
        for line, (label, value) in enumerate(measures.items()):
            panel = panels[line, column]
            for kind, method in ((kind, method) for kind in COLOURS for method in METHODS):
                curve(panel, [row for row in rows if (row["kind"], row["method"]) == (kind, method)], axis, value)
            style(panel, rows, axis, bottom=line == 2)
            if column == 0:
                panel.set_ylabel(label)
        models = " and ".join(usual[kind] for kind in COLOURS)
        fixed = {"size": f"{models}, {usual['batch']} images", "batch": f"{models} at {usual['size']}"}
        panels[0, column].set_title(fixed.get(axis, f"{usual['batch']} images at {usual['size']}"), fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    precision = "bf16" if on_gpu else f"fp32, {setting['threads']} thread" + "s" * (setting["threads"] > 1)
    compiled = ", compiled" if setting["compiled"] else ""
    figure.suptitle(f"What a training step costs: {setting['name']}, {precision}{compiled}", fontsize=12)
    return figure


def curve(panel, rows, axis, value):
    kind, method = rows[0]["kind"], rows[0]["method"]
    x = [row["parameters_m" if axis == "model" else axis] for row in rows]
    dense = method == "DINO"
    panel.plot(
        x,
        [value(row) for row in rows],
        color=COLOURS[kind],
        linestyle="--" if dense else "-",
        marker="o",
        markersize=5,
        markerfacecolor="white" if dense else COLOURS[kind],
        label=f"{kind}, {method} ({METHODS[method]})",
    )


def style(panel, rows, axis, *, bottom):
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(which="major", color="#dddddd", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    ticks = sorted({row["parameters_m" if axis == "model" else axis] for row in rows})
    panel.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    panel.xaxis.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
    if bottom:
        panel.set_xlabel(AXES[axis])


if __name__ == "__main__":
    main()
