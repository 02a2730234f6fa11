"""The table of docs/guide/devices.md: what GPUs of 80 GB hold, from ViT-B to 7 billion parameters, on 1 to 1,024 of them.

python benchmarks/plan_table.py [MODEL ...] [--gb 80] [--gpus 1 8 64 1024]

Computed by dry_run=plan's functions, not measured; no GPU and little memory are needed.
"""

import argparse
import dataclasses

from sslvision.cli.compose import compose_settings
from sslvision.inspection.device_memory import memory_of
from sslvision.inspection.fake_update import OptimizerBytes, StepBytes
from sslvision.workflows.planning import World, measure, prepare

SEVEN = [
    "backbone.embed_dim=4096",
    "backbone.num_heads=32",
    "backbone.mlp_ratio=4",
    "backbone.patch_size=16",
    "local_size=96",
]
MODELS = {
    "ViT-B/16, MAE": ["recipe=mae_vitb16_in1k"],
    "ViT-L/16, MAE": ["recipe=mae_vitl16_in1k"],
    "ViT-H/14, MAE": ["recipe=mae_vith14_in1k"],
    "ViT-g/14, DINO": ["recipe=dino_vitg14_in1k"],
    "7 B, DINO": ["recipe=dino_vitg14_in1k", *SEVEN],
}
IMAGES = 64  # of the smaller of two steps
WORLD = World("cuda", 1, 1, "ddp", "bf16-mixed", 1, IMAGES)
FEW = (2, 4)  # blocks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*MODELS], help="; ".join(MODELS))
    parser.add_argument("--gb", type=float, default=80)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64, 1024])
    arguments = parser.parse_args()
    print(
        "| network | GPUs | DDP: GB, largest batch | FSDP2: GB, largest batch | sent per update: DDP, FSDP2 | choose |"
    )
    print("| --- | ---: | --- | --- | --- | --- |")
    for name in arguments.models:
        for line in lines(name, arguments.gpus, 1e9 * arguments.gb):
            print(line, flush=True)


def lines(name, gpus, memory):
    """Yield the rows of a network."""
    settings = compose_settings([*MODELS[name], "data.root=images"])
    method = prepare(settings, WORLD, sharded=True, recomputed=False)
    # AdamW's two averages; its temporary tensors are next to nothing.
    state = {key: (2 * one.nbytes, 0) for key, one in method.named_parameters() if one.requires_grad}
    about = {"accumulate": 1, "optimizer": OptimizerBytes(state, 0), "low": True}
    found = {}
    for recomputed in (False, True):
        steps = steps_of(settings, len(method.pretrained().blocks()), recomputed=recomputed)
        if recomputed:
            method.enable_activation_checkpointing()
        for n in gpus:
            for strategy in ("ddp", "fsdp2") if n > 1 else ("one process",):
                found[n, strategy, recomputed] = memory_of(method, strategy, n, steps=steps, **about)
    trained = sum(one.numel() for one in method.parameters() if one.requires_grad)
    for n in gpus:
        of = {key[1:]: one for key, one in found.items() if key[0] == n}
        cells = [cell(of, strategy, memory) for strategy in ("ddp" if n > 1 else "one process", "fsdp2")]
        sent = [f"{sum(one.sent.values()) / 1e9:.1f}" for (_, again), one in of.items() if not again and one.sent]
        first = f"{name}, {trained / 1e6:,.0f} M" if n == gpus[0] else ""
        yield f"| {first} | {n:,} | {cells[0]} | {cells[1]} | {', '.join(sent)} | {chosen(of, memory)} |"


def steps_of(settings, depth, *, recomputed):
    """Return the bytes of two steps of a ViT. Its blocks are alike: two and four of them tell what forty need."""
    few, more = (
        measure(prepare(with_depth(settings, some), WORLD, sharded=True, recomputed=recomputed), WORLD) for some in FEW
    )
    share = (depth - FEW[0]) / (FEW[1] - FEW[0])
    return tuple(extrapolated(a, b, share) for a, b in zip(few, more, strict=True))


def with_depth(settings, depth):
    """Return the settings with so many blocks."""
    return dataclasses.replace(settings, backbone={**settings.backbone, "depth": depth})


def extrapolated(one, other, share):
    """Return the bytes of a step beyond two others."""
    names = ("inputs", "forward", "backward", "activations")
    of = {name: getattr(one, name) for name in names}
    return StepBytes(one.images, **{key: round(a + share * (getattr(other, key) - a)) for key, a in of.items()})


def cell(of, strategy, memory):
    """Return GB without activations, and the largest batch: as it is, and with recomputed activations."""
    if (strategy, False) not in of:
        return ""
    usual, again = of[strategy, False], of[strategy, True]
    held = sum(usual.held.values()) + usual.gradients
    return f"{held / 1e9:.1f}, {usual.largest_batch(memory):,} ({again.largest_batch(memory):,})"


def chosen(of, memory):
    """Return the first way that has room for 64 images, else for the most."""
    for (strategy, again), one in sorted(of.items(), key=lambda item: (item[0][1], item[0][0] == "fsdp2")):
        if one.largest_batch(memory) >= IMAGES:
            return strategy + ", recomputed" * again
    (strategy, again), most = max(of.items(), key=lambda item: item[1].largest_batch(memory))
    return strategy + ", recomputed" * again if most.largest_batch(memory) else "does not fit"


if __name__ == "__main__":
    main()
