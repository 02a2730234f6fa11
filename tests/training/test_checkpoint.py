import pytest
import torch

from sslvision.training.checkpoint import AtomicCheckpoints


def test_a_save_that_fails_leaves_the_old_checkpoint_whole_and_nothing_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"step": 1}, file)

    def fill_the_disk(checkpoint, opened):
        opened.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpoints().save_checkpoint({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
