import re
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytorch_lightning as L
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sslvision.methods.dino import DINO
from sslvision.training.callbacks import progress
from sslvision.training.callbacks.progress import Progress

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's use of torch's pytree
    pytest.mark.filterwarnings("ignore:.*many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]
BATCHES, BATCH = 4, 5  # per epoch, images


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


class Tiny(L.LightningModule):
    """Every batch takes a second; at the end of an epoch `evaluate` may take longer."""

    def __init__(self, clock: Clock, evaluate: Callable[[L.Trainer], None] | None = None, seconds: float = 1) -> None:
        super().__init__()
        self.layer, self.latest = nn.Linear(1, 1), cast(dict[str, Tensor], {})
        self.clock, self.evaluate, self.seconds = clock, evaluate, seconds

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.clock.now += self.seconds
        self.latest = {"loss": torch.tensor(0.8125), "entropy": torch.tensor(7.5)}
        return self.layer(batch).square().mean()

    def on_train_epoch_end(self) -> None:
        if self.evaluate:
            self.evaluate(self.trainer)

    def train_dataloader(self) -> "DataLoader[Tensor]":
        return DataLoader(torch.ones(BATCHES * BATCH, 1), batch_size=BATCH)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_with(bar: Progress, **settings: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{"max_epochs": 2, **quiet, **settings}, callbacks=[bar])


def progress_to(file: StringIO, *, terminal: bool = False, **settings: Any) -> Progress:
    console = Console(file=file, force_terminal=terminal, width=120, color_system=None)
    numbers = {"total_steps": 8, "steps_per_epoch": BATCHES, "images_per_step": BATCH, "plain_every_s": 3}
    return Progress(**{**numbers, **settings}, console=console)


def plain_lines(model: Tiny, *, trainer: dict[str, Any] | None = None, **settings: Any) -> list[str]:
    file = StringIO()
    trainer_with(progress_to(file, **settings), **trainer or {}).fit(model)
    return file.getvalue().splitlines()


def test_a_log_gets_a_plain_line_now_and_then_and_one_at_the_end(clock: Clock) -> None:
    assert plain_lines(Tiny(clock)) == [
        "epoch 1/2  3/8 steps  5 img/s  loss 0.8125  ETA 0:00:05",
        "epoch 2/2  6/8 steps  5 img/s  loss 0.8125  ETA 0:00:02",
        "epoch 2/2  8/8 steps  5 img/s  loss 0.8125  in 0:00:08",
    ]


def test_thousands_are_separated_and_the_eta_is_of_the_whole_run(clock: Clock) -> None:
    numbers: dict[str, Any] = {"total_steps": 5400, "steps_per_epoch": 1350, "images_per_step": 4096}
    assert plain_lines(Tiny(clock), **numbers)[0] == "epoch 1/4  3/5,400 steps  4,096 img/s  loss 0.8125  ETA 1:29:57"


def test_evaluation_slows_the_eta_but_not_the_images_per_second(clock: Clock) -> None:
    def knn(trainer: L.Trainer) -> None:
        clock.now += 4
        trainer.callback_metrics["knn_top1"] = torch.tensor(74.21)

    assert plain_lines(Tiny(clock, knn), plain_every_s=1)[3:6] == [
        "epoch 1/2  4/8 steps  5 img/s  loss 0.8125  ETA 0:00:04",
        "epoch 2/2  5/8 steps  5 img/s  loss 0.8125  k-NN 74.2  ETA 0:00:05",  # 3 s of steps x 9 s / 5 s
        "epoch 2/2  6/8 steps  5 img/s  loss 0.8125  k-NN 74.2  ETA 0:00:03",
    ]


def test_validation_in_mid_epoch_does_not_count_as_training(clock: Clock) -> None:
    class Validated(Tiny):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.clock.now += 10

        def val_dataloader(self) -> "DataLoader[Tensor]":
            return self.train_dataloader()

    lines = plain_lines(Validated(clock), trainer={"val_check_interval": 2}, plain_every_s=1)
    assert len(lines) == 9
    assert all("  5 img/s  " in line for line in lines)
    assert lines[-1].endswith("in 0:02:48")  # 8 steps, 4 evaluations of 4 batches


def test_what_happens_before_the_first_batch_is_not_counted(clock: Clock) -> None:
    class Prepared(Tiny):
        def on_train_start(self) -> None:
            self.clock.now += 100

    assert plain_lines(Prepared(clock)) == plain_lines(Tiny(clock))


def test_accumulated_batches_are_one_step(clock: Clock) -> None:
    numbers: dict[str, Any] = {"total_steps": 4, "steps_per_epoch": 2, "images_per_step": 2 * BATCH}
    assert plain_lines(Tiny(clock), trainer={"accumulate_grad_batches": 2}, **numbers) == [
        "epoch 1/2  1/4 steps  5 img/s  loss 0.8125  ETA 0:00:06",
        "epoch 2/2  3/4 steps  5 img/s  loss 0.8125  ETA 0:00:02",
        "epoch 2/2  4/4 steps  5 img/s  loss 0.8125  in 0:00:08",
    ]


@pytest.mark.parametrize("steps", [2, 4])  # in mid-epoch, where Lightning skips on_train_epoch_start; and at its end
def test_a_resumed_run_starts_at_its_step_with_an_honest_speed(clock: Clock, tmp_path: Path, steps: int) -> None:
    class Saving(Tiny):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == steps:
                self.trainer.save_checkpoint(tmp_path / "last.ckpt")

    trainer_with(progress_to(StringIO())).fit(Saving(clock))
    file = StringIO()
    trainer_with(progress_to(file, plain_every_s=1)).fit(Tiny(clock), ckpt_path=tmp_path / "last.ckpt")
    lines = file.getvalue().splitlines()
    assert lines[0] == f"epoch {steps // 4 + 1}/2  {steps + 1}/8 steps  5 img/s  loss 0.8125  ETA 0:00:0{7 - steps}"
    assert lines[-1] == f"epoch 2/2  8/8 steps  5 img/s  loss 0.8125  in 0:00:0{8 - steps}"


def test_the_speed_is_that_of_a_recent_window(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WINDOW", 3)

    class Compiling(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.clock.now += 20 if self.trainer.global_step == 0 else 0
            return super().training_step(batch, batch_idx)

    lines = plain_lines(Compiling(clock), plain_every_s=1)
    assert "  0 img/s" in lines[0]
    assert all("  5 img/s" in line for line in lines[2:-1])


def test_the_method_chooses_what_is_shown(clock: Clock) -> None:
    model = Tiny(clock)
    model.shown = {"entropy": "H", "loss": "loss", "missing": "missing"}  # type: ignore[assignment]
    assert "  H 7.500  loss 0.8125  ETA" in plain_lines(model)[0]


def test_a_method_without_metrics_is_shown_without(clock: Clock) -> None:
    class Silent(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            del self.latest
            return loss

    assert plain_lines(Silent(clock))[0] == "epoch 1/2  3/8 steps  5 img/s  ETA 0:00:05"


@pytest.mark.parametrize(("device", "reads"), [("cpu", 40), ("cuda", 10)])
@pytest.mark.parametrize("terminal", [True, False])
def test_metrics_are_read_only_when_the_display_is_refreshed(
    clock: Clock, device: str, reads: int, terminal: bool
) -> None:
    class Watched(dict[str, Tensor]):
        reads = 0

        def __getitem__(self, name: str) -> Tensor:
            self.reads += 1
            return super().__getitem__(name)

    bar = progress_to(StringIO(), terminal=terminal, total_steps=1000, plain_every_s=0)
    latest = Watched(loss=torch.tensor(0.5))
    model: Any = SimpleNamespace(device=torch.device(device), latest=latest)
    trainer: Any = SimpleNamespace(global_step=0, is_last_batch=False, callback_metrics={})
    bar.on_train_start(trainer, model)
    bar.on_train_epoch_start(trainer, model)
    for _ in range(640):  # ten seconds, 64 steps a second
        clock.now += 1 / 64
        trainer.global_step += 1
        bar.on_train_batch_end(trainer, model, None, None, 0)
    bar.teardown(trainer, model, "fit")
    assert latest.reads == reads


def test_a_terminal_gets_a_bar(clock: Clock) -> None:
    file = StringIO()
    trainer_with(progress_to(file, terminal=True)).fit(Tiny(clock))
    frames = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).replace("\r", "\n").split("\n")
    shown = [re.sub(" *[━╸╺]+ *", " | ", frame).strip() for frame in frames]
    expected = [f"epoch {(n + 3) // 4}/2 | {n}/8 steps  5 img/s  loss 0.8125  ETA 0:00:0{8 - n}" for n in range(1, 9)]
    assert [frame for frame in dict.fromkeys(shown) if "ETA" in frame] == expected
    assert "epoch 2/2 | 8/8 steps  5 img/s  loss 0.8125  in 0:00:08" in shown


def test_a_bar_is_not_redrawn_more_than_four_times_a_second(clock: Clock) -> None:
    file = StringIO()
    trainer_with(progress_to(file, terminal=True)).fit(Tiny(clock, seconds=0.125))
    shown = set(re.findall(r"(\d)/8 steps", file.getvalue()))
    assert shown == {"2", "4", "6", "8"}


def test_a_module_can_print_without_breaking_the_bar(clock: Clock) -> None:
    class Talking(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.print("a word [in brackets]")
            return super().training_step(batch, batch_idx)

    file = StringIO()
    trainer_with(progress_to(file, terminal=True)).fit(Talking(clock))
    lines = [line.rsplit("\x1b[2K", 1)[-1] for line in file.getvalue().split("\n")]
    assert lines.count("a word [in brackets]") == 8


def test_an_error_leaves_the_terminal_as_it_was(clock: Clock) -> None:
    class Failing(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("out of luck")

    before, file = sys.stdout, StringIO()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer_with(progress_to(file, terminal=True)).fit(Failing(clock))
    assert sys.stdout is before
    assert file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize("terminal", [True, False])
def test_a_disabled_bar_says_nothing(clock: Clock, terminal: bool) -> None:
    file = StringIO()
    bar = progress_to(file, terminal=terminal)
    bar.disable()
    trainer_with(bar).fit(Tiny(clock))
    assert file.getvalue() == ""
    bar.enable()
    trainer_with(bar).fit(Tiny(clock))
    assert "8/8 steps" in file.getvalue()


def test_only_the_first_process_shows_progress() -> None:
    bar = progress_to(StringIO())
    bar.setup(cast(L.Trainer, SimpleNamespace(is_global_zero=False)), cast(L.LightningModule, None), "fit")
    assert not bar.is_enabled


def last_line(width: int, *, steps: int = 6240, epochs: int = 40, **metrics: float) -> str:
    """Return the last line that the bar shows of DINO in a terminal of so many columns."""
    file = StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    bar = Progress(total_steps=steps, steps_per_epoch=steps // epochs, images_per_step=64, console=console)
    method = SimpleNamespace(device=torch.device("cpu"), shown=DINO.shown, latest=dict.fromkeys(DINO.shown, 5.125))
    trainer = SimpleNamespace(global_step=steps // 3, callback_metrics=metrics)
    bar.on_train_start(cast(Any, trainer), cast(Any, method))
    bar._resume()
    bar._samples.append((bar._samples[0][0] + 1, trainer.global_step + 80))
    bar._show(cast(Any, trainer), cast(Any, method), "ETA 1:04:33")
    bar._stop()
    lines = [
        line for line in re.sub(r"\x1b\[\d*\w", "", file.getvalue()).replace("\r", "\n").split("\n") if "epoch" in line
    ]
    return lines[-1]


@pytest.mark.parametrize(
    ("width", "steps", "epochs", "also"),
    [
        (80, 6240, 40, "k-NN 75.1"),
        (80, 156_000, 40, "loss"),
        (80, 1_251_200, 800, "loss"),
        (100, 6240, 40, "RankMe 30.2"),
    ],
)
def test_a_narrow_terminal_shows_the_most_important_of_dino_uncut(
    width: int, steps: int, epochs: int, also: str
) -> None:
    line = last_line(width, steps=steps, epochs=epochs, knn_top1=75.1, rankme=30.2)
    assert len(line) <= width
    for part in (f"/{epochs} ", f"{steps // 3:,}/{steps:,}", "5,120 img/s", "loss 5.125", "ETA 1:04:33", also):
        assert part in line, line
    assert "…" not in line


def test_a_wide_terminal_shows_all_of_it() -> None:
    line = last_line(200, knn_top1=75.1, rankme=30.2)
    for part in (*DINO.shown.values(), "k-NN 75.1", "RankMe 30.2", "2,080/6,240 steps"):
        assert part in line


def test_a_run_that_continues_shows_the_score_of_its_start_beside_the_last() -> None:
    assert "k-NN 75.1 (start 76.2)" in last_line(200, knn_top1=75.1, knn_top1_start=76.2)
