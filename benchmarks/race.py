"""Accuracy by the same minutes of training: ours, and MAE and DINO of other libraries, on the same images and cores.

python benchmarks/race.py --data ~/imagenette [--minutes 20] [--seeds 0 1 2] [--contestants ours-mae lightly-mae ...]
python benchmarks/race.py --report [--figure benchmarks/race.png]

Every contestant trains the network of our recipe (mae_photos, dino_photos) in a process of its own. Ours is the command
`sslvision.pretrain recipe=... budget=...`, whose time counts from its start. Others read the images with their own transforms
in two loader processes, and make as many updates as fit into the time, which counts from their first batch. Batch size and
schedule are ours, and the rate is the best that we found for AdamW; with --as-shipped they are those of their examples. The
features of all are evaluated by the same code. What is
done is written to outputs/race/ at once and not repeated.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peers import LightlyDINO, LightlyMAE, TransformersMAE
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from sslvision.augment.randomness import ImageRandom
from sslvision.cli.compose import compose_settings
from sslvision.data.sources.folder import open_folder
from sslvision.evaluation.evaluate import evaluate_backbone
from sslvision.methods.clock import Clock
from sslvision.optim.schedules import cosine_by_step
from sslvision.runs.metrics import read_metrics
from sslvision.training.trainer import configure_torch
from sslvision.workflows.method import method_from_settings

FOLDER = Path("outputs/race")
CONTESTANTS = {
    "ours-mae": None,
    "lightly-mae": LightlyMAE,
    "transformers-mae": TransformersMAE,
    "ours-dino": None,
    "lightly-dino": LightlyDINO,
}
POINTS = 4  # evaluations on the way, by equal shares of the time
ADAMW_LR = {"mae": 1e-3, "dino": 1e-3}  # our recipes' before they had Muon
SHIPPED = {"mae": {"lr": 1.5e-4, "batch_size": 256}, "dino": {"lr": 1e-3, "batch_size": 64}}  # of their examples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of train/ and val/ with class folders")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--as-shipped", action="store_true", help="rate and batch size of the peers' own examples")
    parser.add_argument("--report", action="store_true", help="print what there is and draw the picture")
    parser.add_argument("--figure", type=Path, default=Path("benchmarks/race.png"))
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return train_peer(arguments.one[0], int(arguments.one[1]), arguments)
    if arguments.report:
        return report(arguments.figure)
    for seed in arguments.seeds:
        for name in arguments.contestants:
            run(name, seed, arguments)
    return report(arguments.figure)


def run(name, seed, arguments):
    """Train and evaluate one contestant, unless it is done."""
    file = file_of(name, seed, arguments)
    if file.is_file():
        return
    print(f"{name}, seed {seed}, {arguments.minutes:g} minutes", flush=True)
    if not name.startswith("ours"):
        options = ["--data", arguments.data, "--minutes", str(arguments.minutes), "--one", name, str(seed)]
        options += ["--as-shipped"] * arguments.as_shipped
        subprocess.run([sys.executable, __file__, *options], check=True)
        return
    recipe, folder = name.replace("ours-", "") + "_photos", FOLDER / "runs" / file.stem
    words = [
        f"recipe={recipe}",
        f"data.root={arguments.data}",
        f"budget={round(60 * arguments.minutes)}s",
        f"seed={seed}",
    ]
    words += [f"output_dir={folder}", "overwrite=true"]
    subprocess.run([sys.executable, "-m", "sslvision.pretrain", *words], check=True)
    results, metrics = json.loads((folder / "results.json").read_text()), read_metrics(folder / "metrics.csv")
    last = metrics["step"][-1]
    curve = [
        [60 * arguments.minutes * step / last, score]
        for step, score in zip(metrics["step"], metrics["knn_top1"], strict=True)
        if score is not None
    ]
    baselines = {key: results[f"{key}_top1"] for key in BASELINES}
    write(file, name, seed, arguments, results["knn_top1"], results["linear_top1"], last, curve, baselines)


BASELINES = ("untrained_knn", "untrained_linear", "pixels_knn", "pixels_linear")


def train_peer(name, seed, arguments):
    """Train a peer for the time, and evaluate it on the way and at the end; the clock stands still meanwhile."""
    kind = name.split("-")[1]
    configure_torch("cpu" if not torch.cuda.is_available() else "cuda")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = compose_settings([f"recipe={kind}_photos", f"data.root={arguments.data}", f"seed={seed}"])
    torch.manual_seed(seed)
    ours = method_from_settings(settings).to(device)
    shipped = SHIPPED[kind] if arguments.as_shipped else {}
    batch_size, peak = shipped.get("batch_size", settings.batch_size), shipped.get("lr", ADAMW_LR[kind])
    peer = CONTESTANTS[name](name, ours, None, arch=settings.backbone["name"])
    loader = peer_loader(kind, ours, settings, Path(arguments.data).expanduser() / "train", batch_size)
    splits, seconds = open_folder(arguments.data), 60 * arguments.minutes
    warmup = settings.method["warmup_epochs"] / settings.epochs  # share of the run, as with a budget
    step, spent, curve, began = 0, 0.0, [], time.perf_counter()
    ours.normalize.set([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    while spent < seconds:
        for views, _ in loader:
            share = spent / seconds
            schedule(peer, ours, share, peak, warmup, settings)
            views = [view.to(device) for view in views]
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16(device)):
                loss = peer.loss(views if kind == "dino" else [views[0], noise_of(ours, views[0], seed, step)])
            loss.backward()
            peer.update()
            peer.update_ema()
            step += 1
            now = time.perf_counter()
            spent, began = spent + now - began, now
            if spent >= seconds * (len(curve) + 1) / POINTS or spent >= seconds:
                scores = evaluate_backbone(backbone_of(peer, ours), ours.normalize, splits, at_most=10_000, workers=2)
                print(
                    f"{spent:.0f} s, {step} updates, loss {loss.item():.4f}, k-NN {scores['knn_top1']:.2f}", flush=True
                )
                curve.append([spent, scores["knn_top1"]])
                began = time.perf_counter()
            if spent >= seconds:
                break
    write(
        file_of(name, seed, arguments),
        name,
        seed,
        arguments,
        scores["knn_top1"],
        scores["linear_top1"],
        step,
        curve,
        {},
    )


def bf16(device):
    """Return whether a run of ours would train in bf16 here."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"))


def peer_loader(kind, ours, settings, folder, batch_size):
    """Return lightly's own transforms of the images in loader processes; transformers' example has the same two crops."""
    from lightly.transforms import DINOTransform, MAETransform

    size, method = settings.backbone["image_size"], settings.method
    if kind == "mae":
        transform = MAETransform(input_size=size, min_scale=method["crop_scale"][0])
    else:
        transform = DINOTransform(
            global_crop_size=size,
            global_crop_scale=tuple(method["global_scale"]),
            local_crop_size=ours.crops[-1].shape[0],
            local_crop_scale=tuple(method["local_scale"]),
            n_local_views=method["local_crops"],
        )
    images = ImageFolder(folder, transform=transform)
    return DataLoader(
        images, batch_size, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True, pin_memory=False
    )


def noise_of(ours, images, seed, step):
    """Return the noise that decides which patches are hidden."""
    index = torch.arange(len(images), device=images.device)
    rows, columns = ours.backbone.grid
    return ImageRandom(seed, torch.full_like(index, step), index).uniform("mask", rows * columns)


def schedule(peer, ours, share, peak, warmup, settings):
    """Set the rate (linear warm-up, then half a cosine), the weight decay and the teacher's momentum at a share of the run."""
    steps = 1_000_000
    clock = Clock(int(share * steps), steps, max(1, round(steps / settings.epochs)))
    lr = cosine_by_step(
        clock.step, start=peak, end=settings.method.get("min_lr", 0.0), steps=steps, warmup_steps=round(warmup * steps)
    )
    for group in peer.optimizer.param_groups:
        group["lr"] = lr
        if group.get("decayed", True):
            group["weight_decay"] = ours.schedule(clock)["weight_decay"]
    if peer.momentum is not None:
        peer.momentum = ours.schedule_momentum(clock.step, steps=clock.steps)
        peer.student_head.last_layer.weight_v.requires_grad_(clock.epoch >= ours.freeze_prototypes_epochs)


def backbone_of(peer, ours):
    """Return our backbone with the weights of a peer's: of a teacher, if it has one."""
    backbone = ours.pretrained()
    if isinstance(peer, TransformersMAE):
        copy_from_transformers(peer.model.vit.state_dict(), backbone.model)
        return backbone
    network = peer.teacher_backbone if isinstance(peer, LightlyDINO) else peer.backbone
    backbone.model.load_state_dict(
        {
            name.removeprefix("vit."): value
            for name, value in network.state_dict().items()
            if name.startswith("vit.") and name.removeprefix("vit.") in backbone.model.state_dict()
        }
    )
    return backbone


@torch.no_grad()
def copy_from_transformers(theirs, model):
    """Copy the encoder of a ViTMAE into a timm ViT."""
    own = model.state_dict()
    own["cls_token"].copy_(theirs["embeddings.cls_token"])
    own["pos_embed"].copy_(theirs["embeddings.position_embeddings"])
    for kind in ("weight", "bias"):
        own[f"patch_embed.proj.{kind}"].copy_(theirs[f"embeddings.patch_embeddings.projection.{kind}"])
        own[f"norm.{kind}"].copy_(theirs[f"layernorm.{kind}"])
        for number in range(len(model.blocks)):
            block, layer = f"blocks.{number}.", f"layers.{number}."
            own[f"{block}attn.qkv.{kind}"].copy_(
                torch.cat([theirs[f"{layer}attention.{part}_proj.{kind}"] for part in "qkv"])
            )
            own[f"{block}attn.proj.{kind}"].copy_(theirs[f"{layer}attention.o_proj.{kind}"])
            for mine, other in (
                ("norm1", "layernorm_before"),
                ("norm2", "layernorm_after"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                own[f"{block}{mine}.{kind}"].copy_(theirs[f"{layer}{other}.{kind}"])


def file_of(name, seed, arguments):
    shipped = "-as-shipped" if arguments.as_shipped and not name.startswith("ours") else ""
    return FOLDER / f"{name}{shipped}-{arguments.minutes:g}m-seed{seed}.json"


def write(file, name, seed, arguments, knn, linear, updates, curve, baselines):
    """Write what a contestant reached."""
    found = {
        "contestant": file.stem.rsplit("-", 2)[0],
        "seed": seed,
        "minutes": arguments.minutes,
        "knn": knn,
        "linear": linear,
    }
    found |= {"updates": updates, "curve": curve, **baselines}
    found |= {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[2]}
    found |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


def processor():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def report(figure):
    """Print mean and spread of every contestant, and draw k-NN accuracy against minutes."""
    found = [json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))]
    groups = {}
    for one in found:
        groups.setdefault((one["minutes"], one["contestant"]), []).append(one)
    table = Table(
        title="Imagenette, 224x224 JPEGs, trained and evaluated at 64 pixels: top-1 %, mean ± deviation",
        title_justify="left",
    )
    for column in ("contestant", "minutes", "seeds", "updates", "k-NN", "linear probe"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for (minutes, name), runs in groups.items():
        knn, linear = ([one[key] for one in runs] for key in ("knn", "linear"))
        updates = round(statistics.mean(one["updates"] for one in runs))
        table.add_row(name, f"{minutes:g}", str(len(runs)), f"{updates:,}", spread(knn), spread(linear))
    for key in ("untrained", "pixels"):
        for name in sorted({one["contestant"] for one in found if f"{key}_knn" in one}):
            runs = [one for one in found if one["contestant"] == name and f"{key}_knn" in one]
            scores = (spread([one[f"{key}_{kind}"] for one in runs]) for kind in ("knn", "linear"))
            table.add_row(f"{key} ({name})", "", str(len(runs)), "", *scores)
    Console(width=110).print(table)
    if found:
        draw(groups, figure)
        one = found[0]
        print(f"{one['processor']}, cores: {one['cores']}, torch {one['torch']}, {one['date']}. Picture: {figure}")


def spread(values):
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def draw(groups, figure):
    from matplotlib.figure import Figure

    picture = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = picture.subplots()
    for number, ((_, name), runs) in enumerate(groups.items()):
        for one in runs:
            seconds, scores = zip(*one["curve"], strict=True)
            label = name if one is runs[0] else None
            axes.plot([s / 60 for s in seconds], scores, color=f"C{number}", marker="o", ms=3, lw=1.2, label=label)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("k-NN top-1 (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(figure)


if __name__ == "__main__":
    main()
