"""Methods that change one thing of MAE each. Docs and tests use this file as it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from torch import Tensor

from sslvision import MAE, Clock
from sslvision.optim.param_groups import decay_groups


class MAEWithRMSE(MAE):
    """MAE that logs the root of its loss as well."""

    shown: Mapping[str, str] = {**MAE.shown, "rmse": "RMSE"}  # the progress bar shows it, too

    def losses(self, views: list[Tensor], clock: Clock | None) -> dict[str, Tensor]:
        found = super().losses(views, clock)
        return {**found, "rmse": found["loss"].detach().sqrt()}


class JSONLines(L.Callback):
    """Write the logged metrics to a file; replace `write` by a call of the service you use."""

    def __init__(self, file: str):
        self.file, self.last = Path(file), None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        new = pl_module.logged is not self.last  # each time the log is written it is a new dictionary
        if trainer.is_global_zero and pl_module.logged and new:
            self.last = pl_module.logged
            with self.file.open("a") as file:
                file.write(json.dumps({"step": trainer.global_step, **self.last}) + "\n")


class MAEWithLogger(MAE):
    """MAE whose metrics also go to a file of JSON lines."""

    def __init__(self, backbone: Any, *, json_lines: str, **settings: Any):
        super().__init__(backbone, **settings)
        self.json_lines = json_lines

    def configure_callbacks(self) -> list[L.Callback]:
        return [JSONLines(self.json_lines)]


class MAEWithSGD(MAE):
    """MAE with another optimizer, and a constant learning rate for the decoder's last layer."""

    def optimizer(self) -> torch.optim.Optimizer:
        groups = decay_groups(self)  # weight decay for matrices, none for biases and norms
        last = {id(parameter) for parameter in self.decoder_pred.parameters()}
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in last]
        groups += decay_groups(self.decoder_pred, lr=0.01, constant_lr=True)
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
