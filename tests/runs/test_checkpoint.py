import pytest
import torch
from pytorch_lightning.callbacks import Callback

from sslvision.errors import StorageError, UsageError
from sslvision.runs.checkpoint import AtomicCheckpoints, newest_good
from sslvision.runs.resume import checkpoint_to_resume
from sslvision.system.torch_files import load_verified
from sslvision.training.callbacks.periodic_checkpoints import PeriodicCheckpoints
from sslvision.training.trainer import build_trainer


def state(step):
    return {"global_step": step, "state_dict": {"weight": torch.arange(step + 3.0)}, "optimizer_states": []}


def steps(folder):
    return {file.name: load_verified(file)["global_step"] for file in sorted(folder.iterdir())}


def test_a_checkpoint_is_a_plain_torch_file(tmp_path):
    file = tmp_path / "last.ckpt"
    AtomicCheckpoints(record={"settings": {"lr": 0.1}}).save_checkpoint(state(1), file)
    for mmap in (False, True):
        loaded = torch.load(file, weights_only=True, mmap=mmap)
        assert torch.equal(loaded["state_dict"]["weight"], torch.arange(4.0))
        assert loaded["sslvision"] == {"settings": {"lr": 0.1}}


def test_the_last_few_are_kept_each_whole(tmp_path):
    for step in range(1, 6):
        AtomicCheckpoints(keep=3).save_checkpoint(state(step), tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"last.ckpt": 5, "last-1.ckpt": 4, "last-2.ckpt": 3}
    AtomicCheckpoints(keep=2).save_checkpoint(state(6), tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"last.ckpt": 6, "last-1.ckpt": 5}
    AtomicCheckpoints(keep=1).save_checkpoint(state(7), tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"last.ckpt": 7}


@pytest.mark.parametrize("process", ["the same", "another"])
def test_a_second_save_of_the_same_update_takes_the_place_of_the_first(process, tmp_path):
    writer = AtomicCheckpoints()
    for step in (1, 2):
        writer.save_checkpoint(state(step), tmp_path / "last.ckpt")
    writer = writer if process == "the same" else AtomicCheckpoints()
    writer.save_checkpoint({**state(2), "later": True}, tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"last.ckpt": 2, "last-1.ckpt": 1}
    assert load_verified(tmp_path / "last.ckpt")["later"]


def test_a_missing_rank_is_filled_before_an_older_checkpoint_is_dropped(tmp_path):
    for step in (1, 2, 3):
        AtomicCheckpoints().save_checkpoint(state(step), tmp_path / "last.ckpt")
    (tmp_path / "last-1.ckpt").unlink()
    AtomicCheckpoints().save_checkpoint(state(4), tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"last.ckpt": 4, "last-1.ckpt": 3, "last-2.ckpt": 1}


def test_the_newest_is_found_by_rank_even_beyond_the_tenth(tmp_path):
    for step in range(1, 13):
        AtomicCheckpoints(keep=12).save_checkpoint(state(step), tmp_path / "last.ckpt")
    for rank in ["", *(f"-{number}" for number in range(1, 10))]:
        (tmp_path / f"last{rank}.ckpt").unlink()
    (tmp_path / "last-old.ckpt").write_bytes(b"somebody's own")
    assert newest_good(tmp_path).path == tmp_path / "last-10.ckpt"
    assert newest_good(tmp_path / "nowhere").path is None


def test_a_save_that_fails_leaves_the_old_checkpoint_whole_and_nothing_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint(state(1), file)

    def fill_the_disk(checkpoint, opened):
        opened.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(
        StorageError, match=r"No space left.* bytes, and .* are free there; the previous last.ckpt is intact"
    ):
        AtomicCheckpoints().save_checkpoint(state(2), file)
    monkeypatch.undo()
    assert steps(tmp_path) == {"last.ckpt": 1}


class Progress:
    """The trainer's part that the callback looks at."""

    def __init__(self, steps_per_epoch, accumulate):
        self.saved = []
        self.global_step = self.current_epoch = 0
        self.is_last_batch, self.max_steps = False, -1
        self.steps_per_epoch, self.accumulate_grad_batches = steps_per_epoch, accumulate

    def save_checkpoint(self, path):
        self.saved.append((self.global_step, self.batches))

    def train(self, callback: Callback, epochs, begin=0):
        self.global_step, self.current_epoch = begin, begin // self.steps_per_epoch
        self.batches = 0
        while self.current_epoch < epochs:
            self.batches += 1
            self.global_step += self.batches % self.accumulate_grad_batches == 0
            self.is_last_batch = (
                self.batches % self.accumulate_grad_batches == 0 and self.global_step % self.steps_per_epoch == 0
            )
            callback.on_train_batch_end(self, None, None, None, self.batches - 1)
            if self.is_last_batch:
                callback.on_train_epoch_end(self, None)
                self.current_epoch += 1


def test_checkpoints_come_right_after_updates_never_between_accumulated_batches(tmp_path):
    trainer = Progress(steps_per_epoch=5, accumulate=2)
    trainer.train(PeriodicCheckpoints(tmp_path / "last.ckpt", every_epochs=2, every_steps=3), epochs=2)
    assert trainer.saved == [(3, 6), (6, 12), (9, 18), (10, 20)]
    # A resumed run stands at an update that has been saved: the first accumulated batch is none to save after.
    trainer = Progress(steps_per_epoch=5, accumulate=2)
    trainer.train(PeriodicCheckpoints(tmp_path / "last.ckpt", every_epochs=9, every_steps=3), epochs=2, begin=3)
    assert trainer.saved == [(6, 6), (9, 12)]


def test_what_is_in_effect_goes_into_the_record(tmp_path):
    checkpoints = AtomicCheckpoints(record={"images": 3})
    options = {"precision": "bf16", "accumulate_grad_batches": 4, "accelerator": "cpu", "barebones": False}
    build_trainer(
        folder=tmp_path,
        epochs=1,
        steps=1,
        dry_run=False,
        loggers=[],
        callbacks=[],
        options=options,
        checkpoints=checkpoints,
    )
    assert checkpoints.record == {"images": 3, "precision": "bf16-mixed", "accumulate": 4}


@pytest.mark.parametrize("given", ["auto", "run", "run/checkpoints/last.ckpt"])
def test_a_checkpoint_of_several_files_is_refused_instead_of_starting_again(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run" / "checkpoints" / "last.ckpt"
    folder.mkdir(parents=True)
    with pytest.raises(UsageError, match=r"last\.ckpt is not whole: it has no meta\.pt"):
        checkpoint_to_resume(given, tmp_path / "run")
    (folder / ".metadata").write_bytes(b"an index")
    torch.save({"epoch": 1}, folder / "meta.pt")  # as Lightning writes it
    with pytest.raises(UsageError, match=r"last\.ckpt is a folder of shards.*consolidate_checkpoint.*init_from="):
        checkpoint_to_resume(given, tmp_path / "run")
