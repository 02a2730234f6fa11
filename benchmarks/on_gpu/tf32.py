"""Checks that TF32, which training allows, does not reach what has to be exact: crops, blurs, k-NN, the linear probe."""

import time

import torch

from benchmarks.on_gpu.findings import DRY, device, matmul_precision
from sslvision.augment.blur import SIGMAS, gaussian_blur
from sslvision.augment.color import Photometry, apply_photometry, draw_photometry
from sslvision.augment.crops import Crop
from sslvision.augment.randomness import ImageRandom
from sslvision.data.batch import Batch
from sslvision.data.loader import cut_crops
from sslvision.evaluation.knn import knn_rankings
from sslvision.evaluation.linear_probe import linear_probe

# Name: device, precision of fp32 products
PLACES = {"CPU": ("cpu", "highest"), "without TF32": (device(), "highest"), "with TF32": (device(), "high")}
LEVELS = 1e-2  # gray levels of 255, the largest difference to the CPU that is no fault
CROPS = (Crop(32, (0.4, 1.0)), Crop(16, (0.1, 0.4)))
KINDS = (Photometry(), Photometry(blur_probability=0.0, jitter_probability=0.0, gray_probability=0.0))


def views():
    """Return how far crops, blurs and photometry on CUDA are from the CPU's, with TF32 allowed and without."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator)
    large = torch.randint(256, (16, 3, 224, 224), dtype=torch.uint8, generator=generator)
    results = {name: seen(small, large, place, precision) for name, (place, precision) in PLACES.items()}
    right, rows = results.pop("CPU"), {}
    for name, found in results.items():
        crops = torch.cat(
            [(a.int() - b.int()).abs().flatten() for a, b in zip(right["crops"], found["crops"], strict=True)]
        )
        rows[name] = {
            "crops: share of bytes that differ": float((crops > 0).float().mean()),
            "crops: most": int(crops.max()),
            **{f"{key}: most": float((found[key] - right[key]).abs().max()) for key in ("blur", "photometry")},
            "nothing to change: most": float((found["photometry"][8:] - large[8:].float()).abs().max()),
            "random numbers: most": float((found["noise"] - right["noise"]).abs().max()),
        }
    exact = all(torch.equal(*pair) for pair in zip(*(flat(found) for found in results.values()), strict=True))
    worst = {name: max(value for key, value in row.items() if key.endswith("most")) for name, row in rows.items()}
    bad = [name for name, value in worst.items() if not value < LEVELS]
    return {"short": {"most": worst, "TF32 changes nothing": exact, "bad": bad}, **rows}


def seen(small, large, place, precision):
    """Return crops, blurred and augmented images and random numbers of a device, on the CPU."""
    indices = torch.arange(len(small), device=place)
    batch = Batch([small.to(place)], indices, torch.zeros_like(indices), [], indices)
    images = large.to(place)
    rng = ImageRandom(0, torch.zeros(len(large) // 2, dtype=torch.int64, device=place), indices[: len(large) // 2])
    sigma = torch.arange(len(large), device=place) * (512 // len(large)) / SIGMAS  # from none to 2 pixels
    with matmul_precision(precision):
        return {
            "crops": [crop.cpu() for crop in cut_crops(batch, CROPS, 0).crops],
            "blur": gaussian_blur(images.float(), sigma, 2.0).cpu(),
            "photometry": apply_photometry(images, draw_photometry(rng, range(2), KINDS)).cpu(),
            "noise": rng.uniform("mask", 196).cpu(),
        }


def flat(found):
    return [*found["crops"], found["blur"], found["photometry"]]


def evaluation():
    """Return what k-NN and the linear probe make of the same features on a CPU and on CUDA, with TF32 allowed and without."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(20, 192, generator=generator)
    labels = torch.arange(400 if DRY else 6000) % 20
    features = centers[labels] + 3 * torch.randn(len(labels), 192, generator=generator)
    half, rows, found = len(labels) // 2, {}, {}
    for name, (place, precision) in PLACES.items():
        train = features[:half].to(place)
        with matmul_precision(precision):
            began = time.perf_counter()
            probe = linear_probe(train, labels[:half], features[half:], labels[half:])
            seconds = time.perf_counter() - began
            ranking = knn_rankings(train, labels[:half], features[half:], ks=[20], num_classes=20)[20]
        found[name] = (probe.weight.detach().cpu(), ranking[:, 0].cpu())
        rows[name] = {"probe top1": probe.top1, "probe L2": probe.l2, "probe seconds": round(seconds, 2)}
    weight, nearest = found["CPU"]
    for name, (own_weight, own_nearest) in found.items():
        rows[name] |= {
            "probe: weights differ by": float((own_weight - weight).norm() / weight.norm()),
            "k-NN: share of answers that differ": float((own_nearest != nearest).float().mean()),
        }
    pair = found["without TF32"], found["with TF32"]
    short = {name: [row["probe top1"], row["k-NN: share of answers that differ"]] for name, row in rows.items()}
    exact = all(torch.equal(*one) for one in zip(*pair, strict=True))
    return {"short": short | {"TF32 changes nothing": exact}, **rows}
