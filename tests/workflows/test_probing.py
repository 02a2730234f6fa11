"""The probe from end to end: what it says of a run, of other images, and by which protocol."""

import json
import subprocess
import sys

import pytest

from sslvision.data.sources.digits import open_digits
from sslvision.errors import DataError, UsageError
from sslvision.evaluation.knn import knn_top
from sslvision.evaluation.linear_probe import linear_probe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of results and features."""
    return tmp_path_factory.mktemp("probed")


@pytest.fixture(scope="module")
def probe(settings_of, folder):
    """Probe a run: probe("run=...", ..., into="results") -> results."""

    def run(*words, into="results"):
        from sslvision.workflows.probing import probe

        given = (*words, f"features_dir={folder / 'features'}")
        return probe(settings_of("probe", *given), folder / into, words)

    return run


@pytest.fixture(scope="module")
def of_all_digits(probe, tiny_run):
    """The results of the tiny run on all digits, and a folder with them."""
    return probe(f"run={tiny_run}", "data=digits", "k=[10,20]", into="all")


@pytest.fixture(scope="module")
def of_some_digits(probe, tiny_run):
    """The results on 300 of the training images."""
    return probe(f"run={tiny_run}", "data=digits", "train_images=300", "batch_size=64", into="some")


@pytest.mark.thorough
def test_a_run_is_probed_on_its_own_images_unless_others_are_named(probe, tiny_run):
    own = probe(f"run={tiny_run}", "train_images=100", "pixels=false")
    assert (own["train_images"], own["test_images"]) == (100, 599)
    others = probe(f"run={tiny_run}", "data=embedded", "train_images=100", "pixels=false")
    assert (others["train_images"], others["test_images"]) == (100, 2000)


def test_the_scores_are_those_of_the_frozen_features(of_all_digits, folder, tiny_run):
    from sslvision.backbones.load import load_backbone
    from sslvision.evaluation.features import extract_features
    from sslvision.nn.normalize import Normalize

    found = of_all_digits
    loaded, (train, test, *_) = load_backbone(tiny_run), open_digits()
    normalize = Normalize(loaded.mean, loaded.std)
    features = [extract_features(loaded.backbone, normalize, source, range(len(source)))[1] for source in (train, test)]
    labeled = (features[0], train.labels, features[1], test.labels)
    assert found["knn"]["20"]["top1"] == pytest.approx(knn_top(*labeled, k=20)[0], abs=0.2)
    assert found["linear"]["top1"] == pytest.approx(linear_probe(*labeled).top1, abs=0.4)
    assert found["linear"]["top1"] > 50
    written = json.loads((folder / "all" / "results.json").read_text())
    assert written == found
    assert set(written["linear"]["per_class"]) == set("0123456789")
    low, high = written["linear"]["top1_interval"]
    assert low < written["linear"]["top1"] < high
    assert (folder / "all" / "confusion.png").stat().st_size > 10_000


@pytest.mark.thorough
@pytest.mark.parametrize("protocol", ["mae", "dino"])
def test_the_result_names_its_protocol_and_how_it_differs_from_the_papers(protocol, probe, tiny_run):
    words = (f"run={tiny_run}", "data=digits", f"protocol={protocol}", "train_images=200", "pixels=false")
    found = probe(*words)["linear"]
    assert found["protocol"] == protocol
    assert any("whole image once" in deviation for deviation in found["deviations"])
    several = probe(*words, "views=2")["linear"]
    assert several["views"] == 2
    assert any("2 random crops" in deviation for deviation in several["deviations"])


@pytest.mark.thorough
def test_features_are_computed_once_and_batches_change_no_score(of_some_digits, probe, tiny_run, monkeypatch):
    from sslvision.backbones.vit import ViT

    def refuse(*_):
        raise AssertionError("features are computed again")

    monkeypatch.setattr(ViT, "forward", refuse)
    again = probe(f"run={tiny_run}", "data=digits", "train_images=300", "batch_size=1000")
    assert {**again, "seconds": 0} == {**of_some_digits, "seconds": 0}


@pytest.mark.thorough
def test_the_same_network_untrained_is_another_one(of_all_digits, of_some_digits, probe, tiny_run):
    trained = of_some_digits
    untrained = probe(f"run={tiny_run}", "data=digits", "train_images=300", "pretrained=false")
    assert "before pretraining" in untrained["weights"]
    assert untrained["knn"] != trained["knn"]
    assert untrained["pixels"] == trained["pixels"]
    assert trained["pixels"]["held_out"] == trained["test_images"] == 599  # the same test images as the features
    assert of_all_digits["pixels"]["knn_top1"] == pytest.approx(95.3, abs=0.2)  # of all 1,198 digits


@pytest.mark.thorough
def test_any_timm_model_is_probed_by_its_name(probe):
    found = probe(
        "run=test_vit", "pretrained=false", "data=digits", "backbone.image_size=32", "train_images=200", "pixels=false"
    )
    assert found["weights"] == "random"
    assert found["train_images"] == 200


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([], UsageError, "run is not given"),
        (["run=test_vit", "pretrained=false"], UsageError, "No labeled images.*data=digits"),
        (["run=nowhere", "data=digits"], UsageError, "nowhere"),
        (["run=test_vit", "data=digits", "pretrained=false", "views=3"], UsageError, "views are for protocol=mae"),
        (["run=test_vit", "data=digits", "k=[0]"], UsageError, r"k=\[0\]"),
        (["run=test_vit", "data=digits", "protocol=fats"], UsageError, "Did you mean fast"),
        (["run=test_vit", "data=digits", "backbone.name=resnet18"], UsageError, "backbone.name cannot be given"),
        (["run=test_vit", "data=digits", "protcol=mae"], UsageError, "Did you mean protocol"),
        (["run=test_vit", "data=digits", "device=cuda"], UsageError, "this machine has none"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(words, error, message, probe):
    if "device=cuda" in words:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is one")
    with pytest.raises(error, match=message):
        probe(*words)


def test_images_without_labels_are_refused(probe, tiny_run, tmp_path):
    from PIL import Image

    (tmp_path / "flat").mkdir()
    for number in range(20):
        Image.new("L", (32, 32), number).save(tmp_path / "flat" / f"{number}.png")
    with pytest.raises(DataError, match="has no labels \\(class folders\\), so there is nothing to measure by"):
        probe(f"run={tiny_run}", "data=folder", f"data.root={tmp_path / 'flat'}")


@pytest.mark.e2e
def test_two_processes_give_the_scores_of_one(probe, tiny_run, tmp_path):
    words = [f"run={tiny_run}", "data=digits", "train_images=301"]
    one = probe(*words)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "sslvision.probe", *words, "name=two"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "outputs" / "two" / "results.json").read_text())
    assert two["train_images"] == 301
    assert two["knn"] == one["knn"]
    assert two["linear"]["top1"] == pytest.approx(one["linear"]["top1"], abs=0.2)
