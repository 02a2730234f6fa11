"""Scaling ladders through the command line: what is planned, trained, written, and not trained again."""

import csv
import json
import shutil
from unittest import mock

import pytest
from PIL import Image

from sslvision.errors import UsageError
from sslvision.workflows import rung_training, scaling

SHORT = (
    "recipe=mae",
    "data=digits",
    "backbone.embed_dim=64",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "backbone.patch_size=8",
    "decoder_embed_dim=16",
    "decoder_num_heads=2",
    "batch_size=40",
    "epochs=1",
    "rungs=4",
    "evaluate_images=200",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
)


@pytest.fixture(scope="session")
def scale(settings_of):
    """Make a ladder on digits: scale(folder, "key=value", ...) -> results."""

    def run(folder, *words):
        given = {word.lstrip("~").split("=")[0] for word in words}
        kept = [word for word in SHORT if word.split("=")[0] not in given]
        words = [word for word in words if word[0] != "~"]
        return scaling.scale(settings_of("scale", *kept, *words), folder, words)

    return run


@pytest.fixture(scope="module")
def finished(scale, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaled") / "finished"
    with mock.patch.object(scaling, "SHORTEST", 2):  # the lengths are 4, 7, 14 and 29 updates
        return folder, scale(folder)


def entries_of(folder):
    return [json.loads(line) for line in (folder / "rungs.jsonl").read_text().splitlines()]


def test_a_ladder_of_one_axis_leaves_its_law_its_table_and_its_picture_and_is_not_trained_again(scale, tmp_path):
    folder, once = tmp_path / "images", mock.Mock(side_effect=scaling.train)
    timed = mock.Mock(return_value=rung_training.Times(0.01, 0.1))
    with mock.patch.multiple(scaling, SHORTEST=2, measure=timed, train=once):
        results = [scale(folder, "axes=[images]", "batch_size=148") for _ in range(2)]
        assert once.call_count == 4
        assert timed.call_count == 1  # the time of an update is measured once, too
        once.side_effect = RuntimeError("another training begins")
        with pytest.raises(RuntimeError, match="another training begins"):
            scale(folder, "axes=[images,parameters]", "batch_size=148")
        assert timed.call_count == 4  # of the three sizes that are new
    with pytest.raises(UsageError, match=r"has 8 updates; axes=\['updates'\] needs 160\. Use another name="):
        scale(folder, "axes=[updates]", "batch_size=148")
    assert results[0] == results[1] == json.loads((folder / "results.json").read_text())
    assert list(results[0]["laws"]) == ["images"]
    assert [entry["images"] for entry in entries_of(folder)] == [150, 300, 599, 1198]
    assert (folder / "scaling.csv").read_text().count("\n") == 5
    assert (folder / "figures" / "scaling.png").stat().st_size > 10_000


@pytest.mark.thorough
def test_every_axis_has_its_law_and_the_largest_training_is_shared(finished):
    folder, results = finished
    entries = entries_of(folder)
    assert len(entries) == results["trainings"] == 10
    largest = max(entries, key=lambda entry: (entry["parameters"], entry["images"], entry["updates"]))
    assert (largest["images"], largest["updates"]) == (1198, 29)
    for axis, law in results["laws"].items():
        assert law["largest"] == largest[axis]
        assert law["observed"] == pytest.approx(largest["knn"])
        assert law["ten_times"]["low"] <= law["ten_times"]["high"]
        assert not law["believed"]  # of four sizes
        assert any("4 sizes are too few" in check["words"] for check in law["checks"])
    assert json.loads((folder / "results.json").read_text()) == results


@pytest.mark.thorough
def test_each_training_had_its_size_its_images_and_its_updates(finished):
    folder, _ = finished
    for entry in entries_of(folder):
        (metrics,) = (folder / "rungs").glob(
            f"{entry['parameters']}-parameters_{entry['images']}-images_{entry['updates']}-updates_*/metrics.csv"
        )
        last = metrics.read_text().splitlines()[-1].split(",")
        assert int(last[0]) == entry["updates"]
        assert float(last[1]) == pytest.approx(entry["updates"] / (entry["images"] // 40), rel=1e-3)
        assert 0 < entry["knn_error"] < 10
        assert entry["loss"] > entry["loss_error"] > 0


@pytest.mark.thorough
def test_table_and_figure_hold_every_training(finished):
    folder, _ = finished
    with open(folder / "scaling.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["knn"]) for row in rows] == pytest.approx([entry["knn"] for entry in entries_of(folder)])
    with Image.open(folder / "figures" / "scaling.png") as image:
        assert image.width > 1000


def copy_of(folder, target, lines):
    target.mkdir()
    for name in ("settings.json", "config.yaml", "plan.json"):
        shutil.copy(folder / name, target)
    (target / "rungs.jsonl").write_text("".join(lines))
    return target


@pytest.mark.thorough
def test_what_is_done_is_not_done_again_and_what_is_missing_is(finished, scale, tmp_path, monkeypatch):
    folder, results = finished
    lines = (folder / "rungs.jsonl").read_text().splitlines(keepends=True)
    begun = copy_of(folder, tmp_path / "begun", [*lines[:-1], lines[-1][:20]])  # a kill tore the last one
    monkeypatch.setattr(scaling, "SHORTEST", 2)
    monkeypatch.setattr(scaling, "measure", None)  # the plan is kept
    trained, train = [], scaling.train
    monkeypatch.setattr(scaling, "train", lambda *words: trained.append(words) or train(*words))
    assert scale(begun)["laws"] == results["laws"]  # the training is the same, too
    assert len(trained) == 1


@pytest.mark.thorough
def test_score_and_axes_may_be_changed_afterwards_and_nothing_that_trainings_depend_on(
    finished, scale, tmp_path, monkeypatch
):
    folder, results = finished
    copy = copy_of(folder, tmp_path / "copy", (folder / "rungs.jsonl").read_text().splitlines(keepends=True))
    monkeypatch.setattr(scaling, "SHORTEST", 2)
    monkeypatch.setattr(scaling, "train", None)
    other = scale(copy, "score=loss", "axes=[updates]")
    assert other["score"] == "loss"
    assert list(other["laws"]) == ["updates"]
    with pytest.raises(UsageError, match=r"batch_size=20 \(it was 40\).*overwrite=true"):
        scale(copy, "batch_size=20")
    with pytest.raises(UsageError, match=r"epochs=2 \(it was 1\)"):
        scale(copy, "epochs=2")
    with pytest.raises(UsageError, match=r"budget=1h \(it was None\)"):  # the lengths would follow from it
        scale(copy, "~epochs", "budget=1h")
    assert results["score"] == "knn"


def test_the_length_fills_the_budget_and_a_dry_run_writes_nothing(scale, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "measure", lambda ground, size, seconds: rung_training.Times(0.01, 1.0))
    plan = scale(tmp_path / "none", "budget=1h", "~epochs", "dry_run=true")
    trainings = 3600 - 10  # seconds for updates; a little passed before
    assert plan["updates"] == pytest.approx(trainings / 0.01 / (4 + 3 + 7 / 8), rel=0.01)
    assert "10 trainings to do, about 60" in capsys.readouterr().out.replace("59.9", "60.0")
    assert not (tmp_path / "none").exists()


def test_a_budget_too_small_is_refused_with_what_suffices_before_training(scale, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "measure", lambda ground, size, seconds: rung_training.Times(1.0, 30.0))
    with pytest.raises(UsageError, match=r"budget=6m is too small: .* Give budget=2\dm or more, or take fewer axes"):
        scale(tmp_path / "small", "budget=6m", "~epochs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rungs=3"], r"rungs=3 is too small"),
        (["epochs=5", "axes=[updates]"], r"epochs=5 is 145 updates, and the largest training needs 160: give epochs=6"),
        (["axes=[depth]"], r"axes=\['depth'\] must be one or more of parameters, images, updates"),
        (["init_from=outputs/a"], r"starts from random weights"),
        (["trainer.devices=2", "trainer.strategy=ddp"], r"one device: set trainer.devices=1"),
        (["rungs=6", "batch_size=148"], r"37 of 1,198 images, fewer than batch_size=148"),
        (["recipe=dino", "score=loss", "backbone.num_heads=2"], r"score=loss is not possible: it is MAE's"),
        (
            ["score=loss", "evaluate_images=50"],
            r"more than 50 images that are held out, and 50 are \(evaluate_images=50\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(scale, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        scale(tmp_path / "refused", *words) if "recipe=dino" not in words else _dino(scale, tmp_path, words)


def _dino(scale, tmp_path, words):
    from sslvision.cli.compose import compose_settings
    from sslvision.cli.recipes import SCALE

    scaling.scale(compose_settings([*words, "data=digits", "axes=[updates]"], SCALE), tmp_path / "dino")


def test_dino_without_labels_is_told_that_nothing_can_be_scored():
    from sslvision.backbones.build import build_backbone
    from sslvision.data.sources.digits import open_digits
    from sslvision.methods.dino import DINO
    from sslvision.methods.mae import MAE

    splits = open_digits()
    splits.train.labels = None
    backbone = build_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, channels=1, depth=1)
    dino = DINO(backbone, prototypes=8, hidden=8, bottleneck=8, mean=[0.5], std=[0.5])
    with pytest.raises(UsageError, match=r"nothing to score: .* has no labels .* probe_data=FOLDER"):
        rung_training.scores_of("auto", dino, splits, splits, at_most=100)
    mae = MAE(backbone, decoder_embed_dim=16, decoder_num_heads=2, mean=[0.5], std=[0.5])
    assert rung_training.scores_of("auto", mae, splits, splits, at_most=100) == ("loss",)


def test_a_loss_of_too_few_images_is_left_out_where_labels_give_a_score(settings_of):
    words = [word for word in SHORT if not word.startswith("evaluate_images=")]
    scores = [scaling.prepare(settings_of("scale", *words, f"evaluate_images={n}"))[0].scores for n in (50, 51)]
    assert scores == [("knn",), ("knn", "loss")]


@pytest.mark.e2e
def test_the_same_command_goes_on_in_the_same_folder(command, tmp_path):
    words = [*(word for word in SHORT if word != "epochs=1"), "epochs=6", "axes=[updates]"]
    for told in ("4/4", "0 trainings to do"):
        done = command(*words, of="scale", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
    assert [folder.name for folder in (tmp_path / "outputs").iterdir()] == ["scale-mae-digits"]
