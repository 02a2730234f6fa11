"""Checkpoints that a crash cannot spoil, weights in from anywhere, and the export that plain timm loads."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor

from sslvision.backbones.base import Backbone
from sslvision.backbones.load import load_fitting
from sslvision.errors import UsageError
from sslvision.methods.base import Method


class AtomicCheckpoints(TorchCheckpointIO):
    """Write to a temporary file in the same folder, flush it to the disk, then put it in place of the old one.

    Lightning writes over the old file, and a full disk or a kill then leaves neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save `checkpoint` so that `path` holds the old or the new one whole, never a part."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def export_backbone(
    backbone: Backbone, folder: Path, *, mean: list[float], std: list[float], classes: Sequence[str] | None = None
) -> None:
    """Write model.safetensors and config.json, in timm's own format and under timm's parameter names.

    Both ways of timm load it, the first without knowing anything of the model:
        timm.create_model("local-dir:<folder>", pretrained=True, num_classes=K)
        timm.create_model(name, num_classes=0, checkpoint_path="<folder>/model.safetensors", **model_args)
    where name and model_args stand in config.json. A classifier has its head in the file, and the first way loads it whole
    where num_classes is left out.

    Args:
        backbone: the pretrained backbone, or a classifier: one whose `model.reset_classifier` was called.
        folder: is made if need be.
        mean, std: of the pixels in pretraining, per channel; they go into the file, so users need not guess.
        classes: what the outputs of a classifier stand for, as many as it has.
    """
    names = list(classes or ())
    assert backbone.model.num_classes == len(names), "a classifier is exported with the names of its classes"
    size, known = (backbone.channels, *backbone.image_size), backbone.model.pretrained_cfg
    pretrained = {
        "tag": "sslvision",
        "input_size": size,
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "first_conv": known.get("first_conv"),
        "classifier": known.get("classifier"),
        "num_classes": len(names),
    }
    model = backbone.model
    model.pretrained_cfg = {"architecture": known["architecture"], **pretrained}  # timm looks for the name here
    apart = model.register_state_dict_post_hook(_part_tensors)
    try:
        save_for_hf(
            model,
            str(folder),
            model_config=pretrained | ({"label_names": names} if names else {}),
            model_args=dict(backbone.arguments),
            safe_serialization=True,
        )
    finally:
        apart.remove()
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].pop("num_classes", None)  # the reader's to choose
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _part_tensors(module: Any, state: dict[str, Tensor], *_: Any) -> None:
    """Give tensors that share memory, as CoaT's do, each their own: the file format asks for it."""
    for name, tensor in state.items():
        state[name] = tensor.detach().clone()


def load_weights(method: Method, path: str | Path) -> str:
    """Start `method` from other weights (not from another run's optimizer or position): `init_from=`.

    Args:
        method: whose weights are replaced.
        path: a run folder, a Lightning checkpoint of the same method, or backbone weights under timm's names (.safetensors,
            .pth, an export folder).

    Returns:
        What was loaded, in words.

    Raises:
        UsageError: no such file, or its weights do not fit; some of the differing names and shapes are told.
    """
    file = find_weights(Path(path))
    state = _read(file)
    if "state_dict" in state:
        load_fitting(method, state["state_dict"], file)
        return f"all weights of {file}"
    tensors = {name: value for name, value in state.get("model", state).items() if isinstance(value, Tensor)}
    own = method.pretrained().model.state_dict()
    for module in method.modules():
        if isinstance(module, Backbone):  # DINO has two: the student's and the teacher's
            load_fitting(module.model, {name: value for name, value in tensors.items() if name in own}, file)
    left = len(tensors) - len(own)
    return f"the backbone's weights of {file}" + (f" ({left} other tensors left aside)" if left > 0 else "")


def _read(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return dict(load_file(file))
    return cast(dict[str, Any], torch.load(file, map_location="cpu", weights_only=True))


def find_weights(path: Path) -> Path:
    """Return the weight file that a run folder, an export folder or a path means."""
    for candidate in (
        path,
        path / "checkpoints" / "last.ckpt",
        path / "model.safetensors",
        path / "export" / "model.safetensors",
    ):
        if candidate.is_file():
            return candidate
    raise UsageError(f"{path} holds no weights: give a run folder, a .ckpt, a .safetensors or a .pth file.")
