"""The model card: hubs read it, its code loads the export, and what stands in it is what the run recorded."""

import ast
import importlib.metadata
import json
import re
import shlex

import numpy as np
import pytest
import torch
import yaml
from backbones.exports import exported
from PIL import Image

from sslvision.backbones.load import load_backbone
from sslvision.exports.loading import loading_code
from sslvision.exports.model_card import without_folders, write_card
from sslvision.exports.network import our_outputs
from sslvision.workflows.cards_of_run import write_cards_of_run
from sslvision.workflows.exporting import export_network

CLASSES = ["ant", "bee", "Müsli"]
NEEDED = {"onnx": "onnxruntime", "transformers": "transformers"}


def parts_of(folder):
    """Return the metadata of a card, and its text."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def code_of(text):
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    return code


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "classes"),
    [
        (["format=timm"], None),
        (["format=timm"], CLASSES),
        (["format=transformers"], None),
        (["format=transformers"], CLASSES),
        (["format=onnx"], CLASSES),
        (["format=program", "normalize=beside"], CLASSES),
        (["format=program", "pixels=float"], None),
    ],
)
def test_the_code_in_the_card_loads_the_export_and_gives_our_outputs(
    words, classes, settings_of, tmp_path, monkeypatch
):
    format = words[0].partition("=")[2]
    pytest.importorskip(NEEDED.get(format, "torch"))
    source, folder = tmp_path / "source", tmp_path / "card"
    exported(source, "ViT", channels=3, classes=classes)
    export_network(settings_of("export", f"run={source}", *words), folder)
    # Of an image that is cropped but not resized, all libraries have the same pixels.
    image = np.random.default_rng(0).integers(0, 256, (36, 36, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "image.png")
    head, text = parts_of(folder)
    monkeypatch.chdir(folder)
    found = {}
    exec(code_of(text).replace("image.jpg", "image.png"), found)
    loaded = load_backbone(source)
    loaded.backbone.eval()
    pixels = torch.from_numpy(image[2:34, 2:34]).permute(2, 0, 1)[None]
    name = "logits" if classes else "features"
    with torch.no_grad():
        wanted = our_outputs(loaded, (name,))(pixels)[name]
    theirs = found["found"][name] if "found" in found else found[name]
    torch.testing.assert_close(torch.as_tensor(theirs), wanted, atol=1e-5, rtol=1e-5)
    if classes:
        assert found["label"] == classes[wanted.argmax()]
    assert head["library_name"] == {"program": "pytorch"}.get(format, format)
    assert head["pipeline_tag"] == ("image-classification" if classes else "image-feature-extraction")


def test_the_card_of_a_run_has_its_counts_settings_and_scores_with_intervals(tiny_pretraining):
    run, results = tiny_pretraining
    head, text = parts_of(run / "export")
    low, high = results["intervals"]["knn_top1"]
    assert f"| k-NN top-1 %, frozen features | {results['knn_top1']:g} | {low:g} to {high:g} |" in text
    assert (
        f"| linear probe top-1 %, frozen features: the same, untrained | {results['untrained_linear_top1']:g} |" in text
    )
    assert f"- training images: {results['images']['training']:,}" in text
    environment = json.loads((run / "environment.json").read_text())
    assert environment["processor"] in text
    assert f"torch {environment['packages']['torch']}" in text
    assert "| epochs | 2 |" in text
    assert "MAE: mask_ratio 0.75" in text
    assert head["license"] == "unknown"
    assert "# fill in" in (run / "export" / "README.md").read_text()
    (entry,) = head["model-index"]
    values = {metric["name"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert values["k-NN top-1 %, frozen features"] == results["knn_top1"]
    assert entry["results"][0]["dataset"]["name"] == "digits"
    assert "mae" in head["tags"]


def test_the_hub_reads_the_metadata_and_the_scores(tiny_run):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(tiny_run / "export" / "README.md")
    assert card.data.library_name == "timm"
    assert {result.metric_type for result in card.data.eval_results} == {"accuracy"}


def test_a_run_that_has_not_ended_says_so_and_claims_no_scores(tmp_path):
    exported(tmp_path / "a" / "export", "ViT")
    (tmp_path / "a" / "config.yaml").write_text("data: {name: secret photos, root: /home/me/photos}\nepochs: 3\n")
    write_cards_of_run(tmp_path / "a")
    head, text = parts_of(tmp_path / "a" / "export")
    assert "had not ended" in text
    assert "None are recorded" in text
    assert "model-index" not in head
    assert "/home/me" not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("export of /home/ann/outputs/a", "export of a"),
        (
            "python -m sslvision.pretrain data.root=/data/ann/photos name=a",
            "python -m sslvision.pretrain data.root=photos name=a",
        ),
        ("update 1,200 in /tmp/x/last.ckpt (it has not ended)", "update 1,200 in last.ckpt (it has not ended)"),
        ("run=outputs/a at https://hub.co/me/a, 1/255", "run=outputs/a at https://hub.co/me/a, 1/255"),
    ],
)
def test_what_is_given_away_names_no_folders_of_this_machine(text, shown):
    assert without_folders(text) == shown


def test_a_folder_with_spaces_is_not_named_either():
    run = "/home/Jane Doe/outputs/a b/"
    assert without_folders(f"export of {run}", run) == "export of a b"
    command = ["sslvision.export", f"run={run}", "data.root=~/x/photos", "format=timm", "~/Jane Doe/run", "name=a b"]
    shown = ["sslvision.export", "run=a b", "data.root=photos", "format=timm", "run", "name=a b"]
    assert shlex.split(without_folders(shlex.join(command))) == shown


def test_weights_of_which_nothing_is_known_are_not_described_beyond_that(tmp_path):
    exported(tmp_path, "ResNet")
    write_card(tmp_path, load_backbone(tmp_path), name="net", format="timm", run=None, license="mit")
    head, text = parts_of(tmp_path)
    assert head["license"] == "mit"
    assert "Nothing else is recorded about their training" in text
    assert "unknown images" in text


def test_the_scores_of_the_best_weights_on_the_way_are_in_their_own_card(tmp_path):
    run = tmp_path / "a"
    for name in ("export", "export-best"):
        exported(run / name, "ViT")
    (run / "config.yaml").write_text("data: {}\n")
    (run / "results.json").write_text(json.dumps({"knn_top1": 50.0, "best_knn_top1": 60.0}))
    write_cards_of_run(run)
    of = {name: parts_of(run / name)[0]["model-index"][0] for name in ("export", "export-best")}
    assert of["export"]["results"][0]["metrics"][0]["value"] == 50.0
    assert of["export-best"]["results"][0]["metrics"][0]["value"] == 60.0
    assert of["export-best"]["name"] == "a-best"


@pytest.mark.parametrize(
    ("format", "facts"),
    [
        ("timm", {}),
        ("transformers", {"class": "ViTModel"}),
        ("transformers", {"class": "TimmWrapperModel"}),
        ("onnx", {"input": "uint8 of 0 to 255", "outputs": ["features"]}),
        ("program", {"input": "uint8 of 0 to 255", "outputs": ["features"]}),
    ],
)
def test_what_a_card_says_to_install_has_what_its_code_imports(format, facts, tmp_path):
    exported(tmp_path, "ViT", channels=3)
    text = loading_code(load_backbone(tmp_path), format, facts)
    installed, named = set(), re.search(r"`pip install ([^`]+)`", text).group(1).split()
    while named:  # and what these require
        name = named.pop().lower()
        if name not in installed:
            installed.add(name)
            named += requirements_of(name)
    code = ast.parse(code_of(text))
    imported = {alias.name for line in code.body if isinstance(line, ast.Import) for alias in line.names}
    imported |= {line.module for line in code.body if isinstance(line, ast.ImportFrom)}
    assert {name.replace("PIL", "pillow") for name in imported} - {"json", "pathlib"} <= installed


def requirements_of(package):
    """Return what a package requires without being asked for more; nothing if it is not installed here."""
    try:
        required = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [re.match(r"[\w.-]+", one).group(0) for one in required if "extra ==" not in one]
