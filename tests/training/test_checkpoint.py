import pytest
import timm
import torch

from sslvision.backbones.build import build_backbone
from sslvision.training.checkpoint import AtomicCheckpoints, export_backbone


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


COAT = {"serial_depths": [1] * 4, "parallel_depth": 1, "embed_dims": [16] * 4, "num_heads": 8}


@pytest.mark.parametrize(
    ("name", "image_size", "options"),
    [
        ("test_resnet", 32, {}),
        ("coat_tiny", 32, COAT),  # its modules share tensors
        (
            "swin_tiny_patch4_window7_224",
            32,
            {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        ),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_plain_timm_loads_the_export_of_any_backbone(name, image_size, options, channels, tmp_path):
    torch.manual_seed(0)
    backbone = build_backbone(name, image_size=image_size, channels=channels, **options).eval()
    export_backbone(backbone, tmp_path, mean=[0.5] * channels, std=[0.5] * channels)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    images = torch.rand(2, channels, image_size, image_size)
    assert torch.allclose(loaded(images), backbone(images), atol=1e-5)
    assert loaded.pretrained_cfg["mean"] == pytest.approx([0.5] * channels)
    with_head = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5)
    assert with_head(images).shape == (2, 5)
