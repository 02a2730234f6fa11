"""What is refused on the command line is named as it was given, with what to do instead."""

import numpy as np
import pytest

SOURCE = """
def open_mine(kind="a"):
    raise AssertionError("must not be called")
"""
MAE = "recipe=mae data=digits"
GO_ON = "recipe=mae_continue data=digits"


@pytest.mark.parametrize(
    ("of", "words", "message"),
    [
        ("pretrain", "recipe=mae data._target_=source.open_mine", "source.open_mine has no parameter channels"),
        ("finetune", "run=test_vit data._target_=source.opn", "PYTHONPATH?"),
        ("pretrain", "recipe=mae data._target_=nomodule.opn", "PYTHONPATH?"),
        (
            "finetune",
            "run=test_vit data=digits data.labels=labels.csv",
            "data.labels: labels are the names of class folders",
        ),
        ("finetune", "run=test_vit data=digits multilabel=true", "the loss is that of one class for each image"),
        ("finetune", "run=test_vit data=digits loss=bce", "the loss is that of one class for each image"),
        ("probe", "run=test_vit data=digits recipe=a.yaml", "this command has no recipes"),
        ("pretrain", "recipe=mae data=torchvision data.name=CelebA data.root=sets", "Its images have several labels"),
        ("pretrain", "recipe=mae data=torchvision data.name=VOCDetection data.root=sets", "There are: CIFAR10"),
        ("pretrain", f"{GO_ON} init_from=none.pth", "init_from=none.pth: there is no such file"),
        ("pretrain", f"{GO_ON} init_from=https://x.org/a.pth", "init_from=https://x.org/a.pth is a URL"),
        ("pretrain", f"{GO_ON} init_from=https://x.org/a.pth", "its path, init_from=a.pth."),
        (
            "pretrain",
            f"{GO_ON} init_from=vit_small_patch16_224.din",
            "init_from=vit_small_patch16_224.din: timm has no",
        ),
        (
            "probe",
            "run=lfs.safetensors data=digits",
            "is a pointer of Git LFS and not the file itself: run git lfs pull",
        ),
        (
            "pretrain",
            "resume=nofile.ckpt name=x",
            "there is no such checkpoint or run folder. Give the path of a .ckpt",
        ),
        ("pretrain", f"{MAE} trainer.devices=0", "trainer.devices=auto takes what this machine has."),
        ("pretrain", f"{MAE} trainer.strategy=fsdp", "use trainer.strategy=fsdp2"),
    ],
)
def test_a_refusal_has_a_next_step(of, words, message, warm_command, tmp_path):
    (tmp_path / "source.py").write_text(SOURCE)
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\n")
    words = words.split()
    done = warm_command(*words, of=of, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_images_that_give_no_mean_are_explained_by_the_first(warm_command, tmp_path):
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.zeros((8, 8, 5), np.uint8))
    words = ("recipe=mae", "data=folder", "data.root=.", "data.channels=7", "data.normalize=computed", "data.workers=0")
    done = warm_command(*words, "batch_size=2", cwd=tmp_path)
    assert done.returncode == 3
    assert "can be read; the first: " in done.stderr
    assert ".npy (" in done.stderr
