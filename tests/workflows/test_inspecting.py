"""The command that inspects networks, from its command line to its files."""

import csv
import json

import pytest
import timm
import torch
from PIL import Image

import sslvision
from sslvision.errors import UsageError
from sslvision.inspection.first_filters import filters_of, first_convolution, strongest
from sslvision.workflows.inspection_tables import scaled

QUICK = ("batch_size=2", "repeats=1", "field_images=1", "device=cpu")


@pytest.fixture(scope="module")
def inspect(settings_of, tmp_path_factory):
    """Inspect: inspect("backbone.name=...", ...) -> results, folder."""

    def run(*words):
        from sslvision.workflows.inspecting import inspect_networks

        folder = tmp_path_factory.mktemp("inspected") / "results"
        given = {word.split("=")[0] for word in words}
        words = [*words, *(word for word in QUICK if word.split("=")[0] not in given)]
        return inspect_networks(settings_of("inspect", *words), folder, words), folder

    return run


@pytest.mark.thorough
def test_two_networks_are_measured_from_the_command_line(warm_command, tmp_path):
    words = ("backbone.name=test_resnet,test_vit", "backbone.image_size=32", *QUICK)
    done = warm_command(*words, of="inspect", cwd=tmp_path, COLUMNS="100")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 100
    folder = tmp_path / "outputs" / "inspect-test_resnet-test_vit"
    assert str(folder) in done.stdout
    results = json.loads((folder / "inspect.json").read_text())
    assert [record["name"] for record in results["networks"]] == ["test_resnet", "test_vit"]
    for record in results["networks"]:
        own = timm.create_model(record["name"], num_classes=0, **({"img_size": 32} if "vit" in record["name"] else {}))
        assert record["parameters"] == sum(p.numel() for p in own.parameters())
        assert record["image_size"] == [32, 32]
        assert 0 < record["saved_bytes"] < record["peak_bytes"]
        assert len(record["training_rates"]) == 1
        assert f"{record['parameters'] / 1e6:.2f}" in done.stdout
        assert record["layers"][0]["parameters"] == record["parameters"]
        with Image.open(folder / f"filters-{record['name']}.png") as picture:
            assert picture.width > 400
    with open(folder / "inspect.csv", newline="") as file:
        assert [row["parameters"] for row in csv.DictReader(file)] == [
            str(r["parameters"]) for r in results["networks"]
        ]
    with open(folder / "layers-test_resnet.csv", newline="") as file:
        layers = {row["layer"]: row for row in csv.DictReader(file)}
    assert layers[""]["receptive_field"] == str(results["networks"][0]["receptive_field"]["theoretical"][0])
    assert (folder / "receptive_fields.png").stat().st_size > 5_000
    assert (folder / "inspect.md").read_text().count("\n") == 4


def test_a_run_is_shown_before_and_after_pretraining(inspect, tiny_run, monkeypatch):
    from sslvision.workflows import inspecting

    drawn = []
    monkeypatch.setattr(inspecting, "filters_figure", lambda groups, **about: drawn.append(groups) or _Nothing())
    results, _ = inspect(f"run={tiny_run}", "measure=filters")
    assert results["networks"][0]["remarks"] == []
    ((before, earlier), (after, trained)) = drawn[0]
    assert (before, after) == ("before training, seed 0", "trained")
    loaded = sslvision.load_backbone(tiny_run).backbone.model
    name = first_convolution(loaded, 1)
    assert name == "patch_embed.proj"
    filters = filters_of(loaded, name)
    assert torch.equal(trained, filters[strongest(filters, 64)])
    assert earlier.shape == trained.shape
    assert not torch.equal(earlier, trained)


class _Nothing:
    def savefig(self, file):
        pass


def test_an_export_and_the_same_network_untrained_are_two_rows(inspect, tiny_run):
    results, _ = inspect(
        f"run={tiny_run / 'export'}", "backbone.name=test_vit", "backbone.image_size=32", "measure=cost"
    )
    run, untrained = results["networks"]
    assert (run["name"], run["channels"]) == (tiny_run.name, 1)
    assert (untrained["name"], untrained["channels"], untrained["weights"]) == ("test_vit", 3, "random")
    assert "saved_bytes" not in run


def test_an_image_size_may_be_a_rectangle(inspect):
    results, _ = inspect("backbone.name=test_resnet", "backbone.image_size=[32,64]", "measure=field,cost")
    (record,) = results["networks"]
    assert record["image_size"] == [32, 64]
    assert record["receptive_field"]["effective"]["reach"][1] > record["receptive_field"]["effective"]["reach"][0]


def test_what_fails_for_one_network_is_said_in_its_row_and_the_others_go_on(inspect, monkeypatch):
    from sslvision.workflows import inspecting

    real = inspecting.count_saved_bytes

    def fail_for_vit(model, images):
        if type(model).__name__ == "VisionTransformer":
            raise RuntimeError("out of memory\nat length")
        return real(model, images)

    monkeypatch.setattr(inspecting, "count_saved_bytes", fail_for_vit)
    results, folder = inspect("backbone.name=test_vit,test_resnet", "backbone.image_size=32", "measure=memory")
    first, second = results["networks"]
    assert first["saved_bytes"] is None
    assert first["remarks"] == ["saved activations: not measured, RuntimeError: out of memory"]
    assert second["saved_bytes"] > 0
    assert second["remarks"] == []
    assert "| test_vit | 32 |" in (folder / "inspect.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nothing to inspect: say backbone.name=resnet50"),
        (["backbone.name=test_resnet,resnet5"], "resnet5 is not a timm model. Near it: .*resnet5"),
        (["backbone.name=test_resnet,vit_tiny_patch16_224", "backbone.image_size=100"], "vit_tiny.*100x100.*96 or 112"),
        (["backbone.name=test_vit,test_vit"], "test_vit is given twice"),
        (["backbone.name=test_vit", "measure=cots"], "measure=cots is unknown: .* cost"),
        (["backbone.name=test_vit", "backbone.pretrained=true"], "arguments of timm.create_model"),
        (["run=nowhere"], "run=nowhere is nothing to load"),
        (["backbone.name=test_vit", "batch_size=0"], "batch_size=0 is too small"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_measured(words, message, inspect, monkeypatch):
    from sslvision.workflows import inspecting

    monkeypatch.setattr(inspecting, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UsageError, match=message):
        inspect(*words)


def test_names_are_a_list_with_or_without_brackets(settings_of):
    for words in ("backbone.name=[a,b]", "backbone.name=a,b", "backbone=a,b"):
        assert settings_of("inspect", words).backbone["name"] == ["a", "b"]
    assert settings_of("inspect", "run=outputs/a").run == ["outputs/a"]
    assert settings_of("inspect", "backbone=a").backbone["name"] == ["a"]


def test_as_a_function_it_returns_what_it_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = sslvision.inspect("test_vit", measure=["cost"], output_dir=tmp_path / "a", device="cpu")
    assert found == json.loads((tmp_path / "a" / "inspect.json").read_text())
    assert found["networks"][0]["flops"] > 1e6


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(None, 2, "–"), (0, 2, "0.00"), (4_321, 2, "0.0043"), (67_000, 2, "0.067"), (1_234_567_890, 0, "1,235")],
)
def test_a_small_figure_is_not_rounded_to_zero(value, digits, text):
    assert scaled(value, 1e6, digits) == text
