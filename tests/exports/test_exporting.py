"""The command that exports: what it refuses, what it writes, and that nothing wrong is ever left behind."""

import json

import numpy as np
import pytest
import torch
from backbones.exports import build, exported
from timm.data import create_transform
from torch import nn

import sslvision
from sslvision.augment.crops import resize
from sslvision.backbones.load import Loaded, load_backbone
from sslvision.errors import SSLVisionError, UsageError
from sslvision.exports import deviation as deviations
from sslvision.exports import optional
from sslvision.exports.network import ExportedNetwork, Interface, our_outputs
from sslvision.workflows import exporting


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "vit"
    exported(folder, "ViT", channels=3)
    return folder


def test_timm_is_the_default_and_the_deviation_is_told(source, tmp_path, capsys):
    record = sslvision.export(source, output_dir=tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "export.json",
        "model.safetensors",
    ]
    assert record["deviation"]["relative"]["features"] < 1e-5
    assert record["preprocessing"]["pixels"] <= 2
    told = capsys.readouterr().out
    assert f"features {record['deviation']['relative']['features']:.1e}" in told
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == record
    again = load_backbone(tmp_path / "out").backbone.state_dict()
    for name, value in load_backbone(source).backbone.state_dict().items():
        assert torch.equal(value, again[name])


@pytest.mark.thorough
def test_a_run_that_stopped_is_exported_from_its_newest_checkpoint(train_tiny, settings_of, tmp_path):
    train_tiny(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()  # as if it had not come so far
    record = exporting.export_network(settings_of("export", f"run={tmp_path / 'run'}"), tmp_path / "out")
    assert "update 8 in " in record["weights"]
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    exported_state = load_backbone(tmp_path / "out").backbone.model.state_dict()
    for name, value in exported_state.items():
        assert torch.equal(value, checkpoint[f"backbone.model.{name}"])
    assert "The run had not ended" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run is not given"),
        (["run=a", "outputs=features,tokns"], "outputs=tokns is unknown: .* tokens"),
        (["run=a", "format=onnx", "outputs=features,features"], "features is given twice"),
        (["run=a", "outputs=tokens"], "outputs=tokens has no meaning for format=timm"),
        (["run=a", "format=program", "opset=18"], "opset=18 is of format=onnx"),
        (["run=a", "format=onnx", "opset=9"], "opset=9 must be a whole number from 18"),
        (["run=a", "format=onnx", "normalize=beside", "pixels=float"], "pixels=float has no meaning"),
        (["run=a", "batch_sizes=[0]"], "batch_sizes"),
        (["run=a", "push=name"], "push=name is not the name of a repository"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(words, message, settings_of):
    with pytest.raises(UsageError, match=message):
        settings_of("export", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["outputs=logits", "format=program"], "has no classifier"),
        (["run=nowhere"], "run=nowhere is nothing to load"),
    ],
)
def test_what_a_network_does_not_have_is_refused_before_any_work(
    words, message, source, settings_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(exporting, "WRITERS", {})
    words = words if any(word.startswith("run=") for word in words) else [f"run={source}", *words]
    with pytest.raises(UsageError, match=message):
        exporting.export_network(settings_of("export", *words), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attention_is_for_vits_whose_class_token_is_the_feature(settings_of, tmp_path):
    for kind in ("Swin", "ViT, mean pooled"):
        exported(tmp_path / kind, kind)
        settings = settings_of("export", f"run={tmp_path / kind}", "format=program", "outputs=attention")
        with pytest.raises(UsageError, match=r"outputs=attention: .* plain ViTs with pool=token"):
            exporting.export_network(settings, tmp_path / "out")


def test_a_missing_package_is_named_with_the_extra_that_has_it(source, settings_of, tmp_path, monkeypatch):
    monkeypatch.setattr(optional.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UsageError, match=r"needs onnxscript, which is not installed: pip install 'sslvision\[onnx\]'"):
        exporting.export_network(settings_of("export", f"run={source}", "format=onnx"), tmp_path / "out")


def test_a_folder_in_use_is_kept_unless_it_is_an_export_to_replace(source, settings_of, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is in use"):
        exporting.export_network(settings_of("export", f"run={source}"), tmp_path / "notes")
    with pytest.raises(UsageError, match="is no export"):
        exporting.export_network(settings_of("export", f"run={source}", "overwrite=true"), tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
    exporting.export_network(settings_of("export", f"run={source}"), tmp_path / "out")
    (tmp_path / "out" / "old").touch()
    exporting.export_network(settings_of("export", f"run={source}", "overwrite=true"), tmp_path / "out")
    assert not (tmp_path / "out" / "old").exists()


def test_an_export_that_deviates_is_not_written_and_an_earlier_one_stays(source, settings_of, tmp_path, monkeypatch):
    exporting.export_network(settings_of("export", f"run={source}"), tmp_path / "out")
    before = (tmp_path / "out" / "export.json").read_bytes()
    real = exporting.read_timm

    def a_bit_off(folder, normalize):
        run = real(folder, normalize)
        return lambda images: {name: value + 1e-3 for name, value in run(images).items()}

    monkeypatch.setattr(exporting, "read_timm", a_bit_off)
    with pytest.raises(SSLVisionError, match=r"more than tolerance=1e-05, so nothing was written: features"):
        exporting.export_network(settings_of("export", f"run={source}", "overwrite=true"), tmp_path / "out")
    assert (tmp_path / "out" / "export.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    exporting.export_network(settings_of("export", f"run={source}", "tolerance=0.1"), tmp_path / "near")


def test_a_swin_that_timm_would_pad_is_refused_for_timm_with_the_formats_that_have_our_features(settings_of, tmp_path):
    exported(tmp_path / "swin", "Swin")
    settings = settings_of("export", f"run={tmp_path / 'swin'}", "image_size=24")  # maps of 6x6, windows of 4x4
    with pytest.raises(SSLVisionError, match=r"timm pads the maps of this Swin .* format=onnx and format=program"):
        exporting.export_network(settings, tmp_path / "out")


def test_deviation_is_the_largest_difference_by_the_root_mean_square_over_all_batches():
    backbone = build("ViT", channels=1)
    ours = lambda images: {"features": torch.full((len(images), 2), 2.0)}  # noqa: E731
    theirs = lambda images: {"features": torch.full((len(images), 2), 2.0 + 0.1 * len(images))}  # noqa: E731
    found = deviations.deviation(ours, theirs, backbone, (1, 3, 2))
    assert found.relative["features"] == pytest.approx(0.15)
    assert found.absolute["features"] == pytest.approx(0.3)
    nan = lambda images: {"features": torch.full((len(images), 2), torch.nan)}  # noqa: E731
    with pytest.raises(SSLVisionError, match="inf"):
        deviations.require_close(deviations.deviation(ours, nan, backbone, (1,)), 1e-5)
    short = lambda images: {"features": torch.ones(1, 2)}  # noqa: E731
    with pytest.raises(SSLVisionError, match=r"shape \(1, 2\) for 3 images instead of \(3, 2\)"):
        deviations.deviation(ours, short, backbone, (3,))


def test_preprocessing_that_loses_a_border_is_seen_in_gray_levels():
    backbone = build("ViT", channels=3)
    backbone.crop_pct = 1.0
    right = create_transform((3, 32, 32), interpolation="bicubic", crop_pct=1.0, normalize=False)
    wrong = create_transform((3, 32, 32), interpolation="bicubic", crop_pct=0.875, normalize=False)
    assert deviations.preprocessing_deviation(lambda image: right(image).float(), backbone)["pixels"] <= 2
    assert deviations.preprocessing_deviation(lambda image: wrong(image).float(), backbone)["pixels"] > 10


def test_a_crop_that_is_rounded_down_is_told_apart():
    backbone = build("ViT", channels=3)
    backbone.crop_pct = 1.0
    assert [deviations.begins_at_half_a_pixel((32, 32 + cut), backbone) for cut in range(5)] == [False] * 3 + [
        True,
        False,
    ]

    def rounded_down(image):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        short = min(pixels.shape[1:])
        pixels = resize(pixels, tuple(int(32 * side / short) for side in pixels.shape[1:]))
        top, left = ((side - 32) // 2 for side in pixels.shape[1:])
        return pixels[:, top : top + 32, left : left + 32].float()

    found = deviations.preprocessing_deviation(rounded_down, backbone)
    assert found["pixels"] == 0
    assert found["shifted"] > 10
    assert "one size of images in four" in exporting.in_words(found, "it")
    assert "every image of this image_size" in exporting.in_words({"long": 0.0, "shifted": found["shifted"]}, "it")
    assert "at most 1 of 255" in exporting.in_words({"long": 0.0, "shifted": 1.0}, "it")
    assert (
        exporting.in_words({"pixels": 0, "long": 0, "shifted": 0}, "it")
        == "Preprocessing: it gives our pixels exactly."
    )


@pytest.mark.parametrize("normalize", ["inside", "beside"])
@pytest.mark.parametrize("pixels", ["uint8", "float"])
def test_the_exported_network_has_our_outputs_for_each_kind_of_input(normalize, pixels):
    backbone = build("ViT", channels=3)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    loaded = Loaded(backbone, mean, std, None, "here")
    interface = Interface(("features", "tokens", "attention"), normalize, pixels)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        found = ExportedNetwork(loaded, interface)(interface.values(images, mean, std))
        wanted = our_outputs(loaded, interface.outputs)(images)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_a_network_that_torch_cannot_export_is_told_in_words(tmp_path):
    from sslvision.exports.graphs import write_program

    backbone = build("ViT", channels=3)

    class Branching(nn.Module):
        def forward(self, tokens):
            return tokens if tokens.sum().item() > 0 else -tokens

    backbone.model.norm_pre = Branching()
    loaded = Loaded(backbone, [0.5] * 3, [0.5] * 3, None, "here")
    with pytest.raises(
        SSLVisionError, match=r"torch.export cannot export a VisionTransformer .* Say format=timm instead"
    ):
        write_program(ExportedNetwork(loaded, Interface(("features",))), loaded, tmp_path)


def test_without_a_token_of_the_hub_files_are_listed(source, settings_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "hub_token", lambda: None)
    monkeypatch.setattr(exporting, "push_to_hub", lambda *_, **__: pytest.fail("uploaded"))
    exporting.export_network(settings_of("export", f"run={source}", "push=me/vit"), tmp_path / "out")
    told = capsys.readouterr().out
    assert "Nothing was uploaded to me/vit: there is no token" in told
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert f"model.safetensors  {size:,} bytes" in told
    monkeypatch.setattr(exporting, "hub_token", lambda: "secret")
    words = (f"run={source}", "push=me/vit", "push_dry_run=true", "overwrite=true")
    exporting.export_network(settings_of("export", *words), tmp_path / "out")
    assert "push_dry_run=true. These files would be" in (told := capsys.readouterr().out)
    assert "secret" not in told


def test_with_a_token_the_folder_is_uploaded(source, settings_of, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, **options):
            calls.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(exporting, "hub_token", lambda: "secret")
    exporting.export_network(settings_of("export", f"run={source}", "push=me/vit"), tmp_path / "out")
    assert calls[0] == ("me/vit", {"private": True, "exist_ok": True})
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("me/vit", str(tmp_path / "out"))
    assert "Uploaded to https://hub/me/vit" in capsys.readouterr().out


def test_an_upload_that_fails_says_that_the_export_is_complete(source, settings_of, tmp_path, monkeypatch):
    import huggingface_hub

    class Api:
        def create_repo(self, name, **options):
            raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(exporting, "hub_token", lambda: "secret")
    with pytest.raises(SSLVisionError, match="is complete, but cannot be uploaded to me/vit: 401 Unauthorized"):
        exporting.export_network(settings_of("export", f"run={source}", "push=me/vit"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
