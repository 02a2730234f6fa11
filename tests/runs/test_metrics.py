import math
import os
from pathlib import Path

import pytest
import pytorch_lightning as L
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sslvision.errors import DataError
from sslvision.runs.metrics import MetricsCSV, read_metrics


def test_columns_stand_in_their_order_of_appearance(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.5, "lr": 1e-4, "epoch": 0}, step=10)
    logger.log_metrics({"epoch": 1, "knn_top1": 74.25}, step=20)
    logger.log_metrics({"loss": 0.25, "epoch": 1}, step=30)
    assert (tmp_path / "metrics.csv").read_text() == (
        "step,epoch,loss,lr,knn_top1\n10,0,0.5,0.0001,\n20,1,,,74.25\n30,1,0.25,,\n"
    )


def test_reading_gives_none_where_nothing_was_logged(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.5, "epoch": 0}, step=1)
    logger.log_metrics({"knn_top1": 50.0}, step=2)
    assert read_metrics(logger.path) == {
        "step": [1, 2],
        "epoch": [0, None],
        "loss": [0.5, None],
        "knn_top1": [None, 50],
    }


def test_metrics_of_one_step_share_a_row(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.5, "knn_top1": 40.0, "epoch": 0}, step=1)
    logger.log_metrics({"loss": 0.25, "epoch": 0}, step=2)
    logger.log_metrics({"knn_top1": 50.0, "epoch": 0}, step=2)  # columns known: the row is written over
    logger.log_metrics({"probe_top1": 60.0, "epoch": 0}, step=2)  # a new column: the file is rewritten
    logger.log_metrics({"loss": 0.125, "epoch": 1}, step=3)
    assert logger.path.read_text() == (
        "step,epoch,loss,knn_top1,probe_top1\n1,0,0.5,40,\n2,0,0.25,50,60\n3,1,0.125,,\n"
    )


def test_a_row_that_becomes_shorter_leaves_nothing_behind(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.123456}, step=1)
    logger.log_metrics({"loss": 1.0}, step=1)
    assert logger.path.read_text() == "step,epoch,loss\n1,,1\n"


def test_a_row_is_in_the_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    for step in range(5):
        logger.log_metrics({"loss": float(step)}, step=step)
        assert read_metrics(logger.path)["loss"] == [float(s) for s in range(step + 1)]


def test_a_resumed_run_keeps_the_rows_of_the_first(tmp_path: Path) -> None:
    MetricsCSV(tmp_path).log_metrics({"loss": 0.5, "epoch": 0}, step=1)
    again = MetricsCSV(tmp_path)
    again.log_metrics({"knn_top1": 50.0, "epoch": 0}, step=1)
    again.log_metrics({"loss": 0.25, "epoch": 0}, step=2)
    assert again.path.read_text() == "step,epoch,loss,knn_top1\n1,0,0.5,50\n2,0,0.25,\n"


def test_rewinding_drops_the_rows_after_the_checkpoint(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    for step in (10, 20, 30, 40):
        logger.log_metrics({"loss": 1 / step}, step=step)
    resumed = MetricsCSV(tmp_path)
    resumed.rewind(20)
    assert read_metrics(resumed.path)["step"] == [10, 20]
    resumed.log_metrics({"loss": 1.0}, step=30)
    assert read_metrics(resumed.path)["loss"] == [0.1, 0.05, 1.0]


def test_a_row_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.5, "lr": 0.1}, step=1)
    with logger.path.open("a") as file:
        file.write("2,,0.4")  # no line end: the process died here
    assert read_metrics(logger.path)["loss"] == [0.5]
    MetricsCSV(tmp_path).log_metrics({"loss": 0.25, "lr": 0.1}, step=2)
    assert logger.path.read_text() == "step,epoch,loss,lr\n1,,0.5,0.1\n2,,0.25,0.1\n"


def test_a_failed_rewrite_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=1)
    before = logger.path.read_text()

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        logger.log_metrics({"knn_top1": 50.0}, step=2)
    assert logger.path.read_text() == before


def test_numbers_survive_the_file(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    values = {
        "nan": math.nan,
        "inf": -math.inf,
        "tiny": 1.25e-30,
        "count": 1_281_167,
        "third": float(torch.tensor(1 / 3)),
    }
    logger.log_metrics({**values, "tensor": torch.tensor(0.75)}, step=100_000_000)  # type: ignore[dict-item]
    read = {name: column[0] for name, column in read_metrics(logger.path).items()}
    assert math.isnan(read.pop("nan") or 0)
    assert read == {
        "step": 100_000_000, "epoch": None, "inf": -math.inf, "tiny": 1.25e-30, "count": 1_281_167,
        "third": pytest.approx(1 / 3, rel=1e-7), "tensor": 0.75,
    }  # fmt: skip


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = MetricsCSV(tmp_path / "run")
    logger.log_metrics({"loss": 0.5}, step=1)
    logger.rewind(0)
    assert not (tmp_path / "run").exists()


def test_a_missing_or_foreign_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .*metrics\.csv"):
        read_metrics(tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text("name,price\napple,1\n")
    with pytest.raises(DataError, match="name"):
        read_metrics(tmp_path / "metrics.csv")


class Tiny(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        self.log("doubled", 2 * loss, on_step=False, on_epoch=True)
        return loss

    def train_dataloader(self) -> "DataLoader[Tensor]":
        return DataLoader(torch.ones(8, 1), batch_size=2)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's use of torch's pytree
@pytest.mark.filterwarnings("ignore:.*many workers")
def test_a_trainer_logs_through_it(tmp_path: Path) -> None:
    trainer = L.Trainer(
        max_epochs=2,
        log_every_n_steps=2,
        logger=MetricsCSV(tmp_path),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Tiny())
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert list(metrics) == ["step", "epoch", "loss", "doubled"]
    assert metrics["step"] == [1, 3, 5, 7]  # Lightning counts steps from zero; the epoch's mean joins its last row
    assert metrics["epoch"] == [0, 0, 1, 1]
    assert [value is None for value in metrics["doubled"]] == [True, False, True, False]
    assert sorted(os.listdir(tmp_path)) == ["metrics.csv"]
