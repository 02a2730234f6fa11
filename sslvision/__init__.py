"""sslvision: self-supervised pretraining for vision, from a folder of unlabeled images to a backbone you can use.

    import sslvision

    results = sslvision.pretrain("mae", data="folder", **{"data.root": "photos", "data.channels": 3}, name="photos")
    loaded = sslvision.load_backbone("outputs/photos")
    features = loaded.backbone.pool(loaded.backbone.encode(images))  # (B, C, H, W) -> (B, D)

What is named here is imported when it is first used, so that importing sslvision itself takes no time.
"""

TYPE_CHECKING = False  # type checkers take it as true; importing it from typing takes longer than all of this file

if TYPE_CHECKING:
    from sslvision.backbones.build import build_backbone
    from sslvision.backbones.load import load_backbone
    from sslvision.cli.functions import (
        cluster,
        duplicates,
        embed,
        export,
        finetune,
        inspect,
        outliers,
        pack,
        predict,
        pretrain,
        probe,
        report,
        scale,
        search,
        segment,
        select,
        tune,
    )
    from sslvision.data.source import Source, Splits
    from sslvision.methods.base import Clock, Method
    from sslvision.methods.dino import DINO
    from sslvision.methods.mae import MAE
    from sslvision.methods.supervised import Supervised

__version__ = "0.1.0"

_HOMES = {
    "DINO": "methods.dino",
    "MAE": "methods.mae",
    "Clock": "methods.base",
    "Method": "methods.base",
    "Source": "data.source",
    "Splits": "data.source",
    "Supervised": "methods.supervised",
    "build_backbone": "backbones.build",
    "export": "cli.functions",
    "embed": "cli.functions",
    "search": "cli.functions",
    "duplicates": "cli.functions",
    "outliers": "cli.functions",
    "segment": "cli.functions",
    "select": "cli.functions",
    "cluster": "cli.functions",
    "finetune": "cli.functions",
    "inspect": "cli.functions",
    "load_backbone": "backbones.load",
    "pack": "cli.functions",
    "predict": "cli.functions",
    "pretrain": "cli.functions",
    "probe": "cli.functions",
    "report": "cli.functions",
    "scale": "cli.functions",
    "tune": "cli.functions",
}

__all__ = [
    "DINO",
    "MAE",
    "Clock",
    "Method",
    "Source",
    "Splits",
    "Supervised",
    "build_backbone",
    "cluster",
    "duplicates",
    "embed",
    "export",
    "finetune",
    "inspect",
    "load_backbone",
    "outliers",
    "pack",
    "predict",
    "pretrain",
    "probe",
    "report",
    "scale",
    "search",
    "segment",
    "select",
    "tune",
]


def __getattr__(name: str) -> object:
    """Import a name of the public API when it is first used."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Return all names, those not yet imported too."""
    return [*globals(), *__all__]
