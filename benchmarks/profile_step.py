"""Where the time of a training step goes, from image to updated weights.

python benchmarks/profile_step.py recipe=mae [key=value ...]

Runs the recipe under its Trainer with a clock around each phase. What no phase takes is the loader's, Lightning's and the
callbacks'. Times are medians over steps, on whatever device the recipe would train on.
"""

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pytorch_lightning as L
import torch
from rich.console import Console
from rich.table import Table

from sslvision.cli.compose import compose_settings
from sslvision.data.datamodule import ImageData, pixel_statistics
from sslvision.training.trainer import build_trainer, configure_method, configure_torch, silence_lightning
from sslvision.workflows.method import method_from_settings
from sslvision.workflows.pretraining import open_splits

STEPS, WARM_UP = 200, 20
CROPS, VIEWS, FORWARD, BACKWARD = (
    "crops (on the device)",
    "views: augment, normalize, mask noise",
    "forward",
    "backward",
)
UPDATE, REST = "update: norms, clip, optimizer, teacher", "loader, Trainer, logging"


class StepTimes(L.Callback):
    """Wall time from one step's end to the next one's, everything between included."""

    def __init__(self, steps=60):
        self.steps, self.ends = steps, []

    def on_train_batch_end(self, trainer, *_):
        self.ends.append(time.perf_counter())
        trainer.should_stop = len(self.ends) >= self.steps

    def median(self):
        gaps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(gaps[10:])


class Phases(StepTimes):
    """Seconds of each phase of each step."""

    def __init__(self, device):
        super().__init__(STEPS)
        self.device, self.current, self.of_steps = device, defaultdict(float), []

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, owner, name, phase):
        """Have a clock run while the owner's method does."""
        function = getattr(owner, name)

        def timed(*arguments, **keywords):
            start = self.now()
            result = function(*arguments, **keywords)
            self.current[phase] += self.now() - start
            return result

        owner.__dict__[name] = timed

    def on_train_start(self, trainer, method):
        self.around(trainer.datamodule, "on_after_batch_transfer", CROPS)
        self.around(method, "views", VIEWS)
        self.around(method, "losses", FORWARD)
        self.around(trainer.strategy, "backward", BACKWARD)
        self.around(method, "after_update", UPDATE)
        (optimizer,) = trainer.optimizers
        self.around(optimizer, "zero_grad", UPDATE)
        step = optimizer.step

        def timed(*arguments, **keywords):  # it calls forward and backward itself, and then `on_before_optimizer_step`
            result = step(*arguments, **keywords)
            self.current[UPDATE] += self.now() - self.began
            return result

        optimizer.step = timed

    def on_before_optimizer_step(self, *_):
        self.began = self.now()

    def on_train_batch_end(self, trainer, *_):
        super().on_train_batch_end(trainer)
        self.of_steps.append(dict(self.current))
        self.current.clear()

    def medians(self):
        """Return the seconds of each phase and of a step."""
        gaps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        steps = [{**step, REST: gap - sum(step.values())} for step, gap in zip(self.of_steps[1:], gaps, strict=True)]
        found = {phase: statistics.median(step[phase] for step in steps[WARM_UP:]) for phase in steps[-1]}
        return {phase: found[phase] for phase in (REST, CROPS, VIEWS, FORWARD, BACKWARD, UPDATE)}


def main():
    settings = compose_settings(sys.argv[1:])
    silence_lightning()
    configure_torch(settings.trainer.get("accelerator", "auto"))
    splits = open_splits(settings.data)
    method = method_from_settings(settings)
    method.normalize.set(*pixel_statistics(splits.train, settings.data.get("normalize", "computed")))
    data = ImageData(splits, method.crops, batch_size=settings.batch_size, workers=settings.data.get("workers"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            folder=Path(folder),
            epochs=settings.epochs,
            steps=settings.epochs * (len(splits.train) // settings.batch_size),
            dry_run=False,
            loggers=[],
            callbacks=[],
            options={**settings.trainer, "enable_progress_bar": False},
        )
        phases = Phases(trainer.strategy.root_device)
        trainer.callbacks.append(phases)
        configure_method(method, phases.device, compile=settings.compile, cuda_graphs=False)  # a graph has no phases
        trainer.fit(method, datamodule=data)
    report(phases.medians(), settings.batch_size)


def report(phases, batch_size):
    whole = sum(phases.values())
    table = Table(title=f"One step of {batch_size} images, {torch.get_num_threads()} CPU threads", title_justify="left")
    table.add_column("phase")
    table.add_column("ms", justify="right")
    table.add_column("share of a step %", justify="right")
    for phase, seconds in phases.items():
        table.add_row(phase, f"{1e3 * seconds:.2f}", f"{100 * seconds / whole:.1f}")
    table.add_section()
    other = sum(phases[phase] for phase in (REST, CROPS, VIEWS))
    table.add_row("all but forward, backward, update", f"{1e3 * other:.2f}", f"{100 * other / whole:.1f}")
    table.add_row("a step", f"{1e3 * whole:.2f}", f"{batch_size / whole:,.0f} img/s")
    Console().print(table)


if __name__ == "__main__":
    main()
