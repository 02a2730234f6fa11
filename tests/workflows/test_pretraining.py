"""Pretraining from end to end: what a run leaves behind, what it refuses, and how it goes on."""

import csv
import json
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from sslvision.backbones.swin import Swin
from sslvision.backbones.vit import ViT
from sslvision.cli.compose import compose_settings
from sslvision.cli.recipes import PRETRAIN
from sslvision.errors import DataError, Diverged, UsageError
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.workflows import final_evaluation
from sslvision.workflows.pretraining import method_from_settings


@pytest.fixture
def finished(tiny_pretraining):
    """A finished tiny run: its folder and what it returned."""
    return tiny_pretraining


@pytest.fixture(scope="module")
def finished_dino(run_tiny, tmp_path_factory):
    """The same of DINO."""
    folder = tmp_path_factory.mktemp("runs") / "finished_dino"
    return folder, run_tiny(folder, "knn_every_epochs=1", recipe="dino")


def table(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def checkpoint_of(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_the_run_folder_explains_itself(finished):
    folder, results = finished
    written = json.loads((folder / "results.json").read_text())
    assert written == results
    for name in ("knn_top1", "linear_top1", "untrained_knn_top1", "untrained_linear_top1", "pixels_knn_top1"):
        assert 0 <= written[name] <= 100
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["batch_size"] == 296
    assert settings["method"]["mask_ratio"] == 0.75
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or environment["packages"]["torch"]
    assert environment["cores"] >= 1
    assert "recipe=mae" in environment["command"] or "sslvision.pretrain" in environment["command"]
    readme = (folder / "README.md").read_text()
    for file in ("results.json", "config.yaml", "environment.json", "metrics.csv", "checkpoints/last.ckpt", "export/"):
        assert file in readme
        assert (folder / file).exists()
    check_figures(folder, "neighbors", "reconstructions", "patch_features", "learning_curve", "health")


def check_figures(folder, *names):
    assert {file.stem for file in (folder / "figures").glob("*.png")} == set(names)
    for name in names:
        with Image.open(folder / "figures" / f"{name}.png") as image:
            assert min(image.size) > 180
            assert np.asarray(image.convert("L")).std() > 5


def test_a_dino_run_leaves_the_teacher_and_its_pictures_and_health(finished_dino):
    folder, results = finished_dino
    check_figures(folder, "neighbors", "attention", "patch_features", "learning_curve", "health")
    state = checkpoint_of(folder)["state_dict"]
    exported = load_file(folder / "export" / "model.safetensors")
    for name, value in exported.items():
        assert torch.equal(value, state[f"teacher.backbone.model.{name}"]), name
    weight = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(exported[weight], state[f"student.backbone.model.{weight}"])
    rows = table(folder / "metrics.csv")
    for name in ("teacher_entropy", "kl", "loss_over_ln_k", "center_norm", "mutual_information"):
        assert sum(row[name] != "" for row in rows) == 8
    assert [1 <= float(row["rankme"]) <= 32 for row in rows if row["rankme"]] == [True, True]
    assert results["rankme"] == float([row["rankme"] for row in rows if row["rankme"]][-1])
    assert results["findings"] == []


def test_every_update_is_in_the_metrics_with_the_rate_the_schedule_says(finished):
    folder, _ = finished
    rows = table(folder / "metrics.csv")
    rates = {int(row["step"]): float(row["lr"]) for row in rows if row["lr"]}
    peak = max(rates.values())
    assert sorted(rates) == list(range(1, 9))
    assert [rates[step] / peak for step in (1, 2, 3, 4)] == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert rates[5] == peak
    assert rates[8] < 0.2 * peak
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert losses[-1] < losses[0]


def test_both_ways_of_timm_load_the_export_and_give_the_features_of_the_trained_backbone(finished):
    folder, _ = finished
    state = checkpoint_of(folder)["state_dict"]
    exported = load_file(folder / "export" / "model.safetensors")
    for name, value in exported.items():
        assert torch.equal(value, state[f"backbone.model.{name}"]), name
    images = torch.randn(3, 1, 32, 32)
    knowing_nothing = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True, num_classes=0).eval()
    written = json.loads((folder / "export" / "config.json").read_text())
    plain = timm.create_model(
        written["architecture"],
        num_classes=0,
        checkpoint_path=str(folder / "export" / "model.safetensors"),
        **written["model_args"],
    ).eval()
    assert torch.equal(knowing_nothing(images), plain(images))
    with_head = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True, num_classes=7)
    assert with_head(images).shape == (3, 7)
    assert knowing_nothing.pretrained_cfg["mean"] == pytest.approx(state["normalize.mean"].tolist())
    assert torch.equal(plain.blocks[0].mlp.fc1.weight, state["backbone.model.blocks.0.mlp.fc1.weight"])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(finished, train_tiny, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    train_tiny(again)
    train_tiny(other, "seed=1")
    first = checkpoint_of(finished[0])["state_dict"]
    assert all(torch.equal(value, first[name]) for name, value in checkpoint_of(again)["state_dict"].items())
    name = "backbone.model.blocks.0.mlp.fc1.weight"
    assert not torch.equal(checkpoint_of(other)["state_dict"][name], first[name])


@pytest.mark.thorough
def test_weights_are_taken_from_another_run_or_an_export_and_refused_where_they_do_not_fit(
    finished, train_tiny, tmp_path
):
    folder, _ = finished
    trained = checkpoint_of(folder)["state_dict"]
    results = {}
    for source in (folder, folder / "export"):
        target = tmp_path / source.name
        # With a rate of nearly nothing the weights stay where they began.
        results[source.name] = train_tiny(target, f"init_from={source}", "lr=1e-12", "epochs=1")
        state = checkpoint_of(target)["state_dict"]
        name = "backbone.model.blocks.0.mlp.fc1.weight"
        assert torch.allclose(state[name], trained[name], atol=1e-8)
    decoder = "decoder_pred.weight"
    assert torch.allclose(checkpoint_of(tmp_path / folder.name)["state_dict"][decoder], trained[decoder], atol=1e-8)
    assert not torch.allclose(checkpoint_of(tmp_path / "export")["state_dict"][decoder], trained[decoder], atol=1e-3)
    with pytest.raises(UsageError, match=r"do not fit.*there and .* here"):
        train_tiny(tmp_path / "x", f"init_from={folder}", "backbone.embed_dim=16")
    with pytest.raises(UsageError, match="has no weights"):
        train_tiny(tmp_path / "x", f"init_from={tmp_path}")


def test_a_backbone_to_start_from_is_the_students_and_the_teachers(finished_dino, train_tiny, tmp_path):
    export = finished_dino[0] / "export"
    train_tiny(tmp_path / "run", f"init_from={export}", "lr=1e-12", "epochs=1", recipe="dino")
    state = checkpoint_of(tmp_path / "run")["state_dict"]
    weight = load_file(export / "model.safetensors")["blocks.0.mlp.fc1.weight"]
    for whose in ("student", "teacher"):
        assert torch.allclose(state[f"{whose}.backbone.model.blocks.0.mlp.fc1.weight"], weight, atol=1e-8)


def test_a_used_folder_is_refused_and_emptied_only_if_it_is_a_runs(finished, train_tiny, tmp_path):
    used = tmp_path / "used"
    shutil.copytree(finished[0], used)
    (used / "old.txt").write_text("of the run before")
    with pytest.raises(UsageError, match=r"in use.*overwrite=true"):
        train_tiny(used)
    train_tiny(used, "overwrite=true", "epochs=1")
    assert not (used / "old.txt").exists()
    private = tmp_path / "private"
    private.mkdir()
    (private / "thesis.txt").write_text("dear")
    with pytest.raises(UsageError, match="not a run folder"):
        train_tiny(private, "overwrite=true")
    assert (private / "thesis.txt").exists()


def test_a_loss_that_is_not_finite_ends_the_run_in_words(run_tiny, tmp_path):
    with pytest.raises(Diverged, match="Lower the learning rate"):
        run_tiny(tmp_path / "run", "lr=1e18", "warmup_epochs=0")


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.e2e)])
def test_gradients_are_clipped_if_asked_in_any_precision(precision, train_tiny, tmp_path):
    name = "backbone.model.blocks.0.mlp.fc1.weight"
    weights = []
    for clip in ("null", "1e-12"):  # so short that Adam's epsilon is larger, and nothing moves
        words = [
            f"trainer.gradient_clip_val={clip}",
            f"trainer.precision={precision}",
            *("epochs=1", "knn_every_epochs=0", "weight_decay=0"),
        ]
        train_tiny(tmp_path / clip, *words, "lr=1e-3")
        weights.append(checkpoint_of(tmp_path / clip)["state_dict"][name])
    free, clipped = weights
    assert (free - clipped).abs().max() > 1e-4


def test_fewer_images_than_a_batch_are_refused_before_the_folder_is_made(run_tiny, tmp_path):
    with pytest.raises(DataError, match=r"1198 images.*batch of 2000"):
        run_tiny(tmp_path / "run", "batch_size=2000")
    assert not (tmp_path / "run").exists()


def photographs(folder, count, broken):
    """Mixed files in class folders: JPEG and PNG, gray and color, big and small, some of them damaged."""
    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / ("cats" if number % 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        size = tuple(random.integers(20, 90, 2)) + ((3,) if number % 3 else ())
        image = Image.fromarray(random.integers(0, 256, size, dtype=np.uint8))
        image.save(place / f"{number}.{'png' if number % 5 == 0 else 'jpg'}")
        if number < broken:
            (place / f"broken{number}.jpg").write_bytes(b"" if number % 2 else b"\xff\xd8 not a picture")


def test_a_folder_with_broken_images_trains_and_names_them(run_tiny, tmp_path):
    photographs(tmp_path / "images", count=60, broken=4)
    results = run_tiny(
        tmp_path / "run",
        "data=folder",
        f"data.root={tmp_path / 'images'}",
        "data.workers=0",
        "batch_size=20",
        "epochs=2",
    )
    assert 0 <= results["knn_top1"] <= 100
    named = {row["image"]: row["reason"] for row in table(tmp_path / "run" / "unreadable.csv")}
    assert named
    assert all("broken" in image and reason for image, reason in named.items())


def test_too_many_broken_images_end_the_run_with_their_names(run_tiny, tmp_path):
    photographs(tmp_path / "images", count=40, broken=20)
    with pytest.raises(DataError, match=r"broken.*more than data.max_unreadable=0.1"):
        run_tiny(
            tmp_path / "run",
            "data=folder",
            f"data.root={tmp_path / 'images'}",
            "data.workers=0",
            "batch_size=20",
            "epochs=9",
        )


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory):
    """Forty images in one folder, and how a tiny run reads them."""
    folder = tmp_path_factory.mktemp("unlabeled") / "images"
    photographs(folder, count=40, broken=0)
    for image in list(folder.glob("*/*")):
        image.rename(folder / image.name)
    return "data=folder", f"data.root={folder}", "data.workers=0", "batch_size=20", "data.channels=1"


def test_the_features_are_looked_at_every_so_many_updates_and_halfway_of_a_short_run(train_tiny, tmp_path):
    train_tiny(tmp_path / "updates", "knn_every_epochs=0", "knn_every_steps=3", "epochs=2")  # of four updates
    train_tiny(tmp_path / "half", "knn_every_epochs=10", "epochs=2")
    train_tiny(tmp_path / "without", "knn_every_epochs=0", "epochs=2")
    looks = {run: [row["step"] for row in table(tmp_path / run / "metrics.csv") if row.get("knn_top1")]
             for run in ("updates", "half", "without")}  # fmt: skip
    assert looks == {"updates": ["3", "6"], "half": ["4"], "without": []}
    assert table(tmp_path / "updates/metrics.csv")[2]["epoch"] == "0.75"
    weights = [checkpoint_of(tmp_path / run)["state_dict"] for run in looks]
    assert all(torch.equal(one[name], weights[0][name]) for one in weights for name in one)  # a look changes nothing
    assert (tmp_path / "updates/figures/reconstructions.png").is_file()


def test_without_labels_rankme_is_compared_with_the_untrained_networks_and_neighbors_are_drawn(
    unlabeled, run_tiny, tmp_path, capsys
):
    results = run_tiny(tmp_path / "run", *unlabeled)
    assert results["rankme"] > 1
    assert results["untrained_rankme"] > 1
    assert not [name for name in results if "top1" in name]
    assert "probe_data=FOLDER measures accuracy" in capsys.readouterr().out
    for name in ("reconstructions", "neighbors"):
        with Image.open(tmp_path / "run/figures" / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_labeled_images_beside_an_unlabeled_training_set_give_scores_on_the_way_and_at_the_end(
    unlabeled, run_tiny, tmp_path
):
    photographs(tmp_path / "labeled", count=60, broken=0)
    results = run_tiny(tmp_path / "run", *unlabeled, f"probe_data={tmp_path / 'labeled'}", "knn_every_epochs=1")
    assert 0 <= results["knn_top1"] <= 100
    assert results["held_out_images"] == 3  # a twentieth of 60
    on_the_way = [row["knn_top1"] for row in table(tmp_path / "run/metrics.csv") if row["knn_top1"]]
    assert len(on_the_way) == 2  # after the first epoch, and at the end
    with pytest.raises(UsageError, match=r"probe_data=.* cannot be evaluated on: .* has no labels"):
        run_tiny(tmp_path / "other", *unlabeled, f"probe_data={tmp_path / 'labeled/cats'}")


def test_a_final_score_with_more_neighbors_than_on_the_way_is_no_point_of_the_same_curve(
    run_tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(final_evaluation, "ON_THE_WAY", 20)
    results = run_tiny(tmp_path / "run", "knn_every_epochs=1", "epochs=2")
    first, last = (row for row in table(tmp_path / "run/metrics.csv") if row["knn_top1"] or row["final_knn_top1"])
    assert float(first["knn_top1"]) > 0
    assert not first["final_knn_top1"]
    assert (last["knn_top1"], float(last["final_knn_top1"])) == ("", results["knn_top1"])


ON_FOLDERS = ("in1k", "imagenette", "photos", "continue")  # ends of the names of recipes that read a folder


@pytest.mark.parametrize("recipe", PRETRAIN.recipes)
def test_every_recipe_is_a_method_on_a_backbone_of_the_size_it_says(recipe):
    given = ["data.root=photos"] if recipe.endswith(ON_FOLDERS) else []
    given += ["backbone.name=vit_small_patch16_224", "backbone.image_size=224"] if recipe.endswith("continue") else []
    settings = compose_settings([f"recipe={recipe}", *given])
    with torch.device("meta"):
        method = method_from_settings(settings)
    backbone = method.pretrained()
    assert backbone.image_size == (settings.backbone["image_size"],) * 2
    assert isinstance(backbone, Swin if "swin" in recipe else ViT)
    assert isinstance(method, MAE if recipe.startswith("mae") else DINO)
    assert method.crops[0].size == settings.backbone["image_size"]
    millions = round(sum(parameter.numel() for parameter in backbone.parameters()) / 1e6)
    of_paper = {"vits16": 22, "vitb16": 86, "vitl16": 303, "swint": 28}  # without the head of 1,000 classes
    named = [name for name in of_paper if name in recipe]
    assert not named or millions == of_paper[named[0]]


# The others begin, train and end with the same code.
QUICK = ("mae", "dino", "mae_swin", "dino_vits16_in1k", "dino_photos", "mae_continue")


@pytest.mark.parametrize(
    "recipe", [name if name in QUICK else pytest.param(name, marks=pytest.mark.e2e) for name in PRETRAIN.recipes]
)
def test_every_recipe_takes_two_steps_through_the_real_command_line(recipe, warm_command, tiny_run, tmp_path):
    photographs(tmp_path / "images" / "train", count=16, broken=0)
    photographs(tmp_path / "images" / "val", count=6, broken=0)
    small = ["batch_size=8", "evaluate_images=50"]
    swin = "swin" in recipe
    stages = 4 if recipe.endswith("in1k") else 2
    if recipe.endswith("continue"):
        small += [
            f"init_from={tiny_run}",
            "data.channels=1",
            "hidden=32" if "dino" in recipe else "decoder_num_heads=2",
        ]
    elif swin:
        small += ["backbone.embed_dim=32", f"backbone.depths={[1] * stages}", f"backbone.num_heads={[2] * stages}"]
    else:
        small += ["backbone.embed_dim=32", "backbone.depth=1", "backbone.num_heads=2"]
    small += {"mae": ["decoder_depth=1"], "dino": ["prototypes=64", "bottleneck=32"]}[recipe.split("_")[0]]
    folder = [f"data.root={tmp_path / 'images'}", "data.workers=0", f"data.cache_dir={tmp_path / 'cache'}"]
    folder = folder if recipe.endswith(ON_FOLDERS) else []
    done = warm_command(f"recipe={recipe}", "dry_run=true", "output_dir=run", *small, *folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "linear probe" in done.stdout
    results = json.loads((tmp_path / "run-dry-run" / "results.json").read_text())
    assert results["loss"] > 0
    assert checkpoint_of(tmp_path / "run-dry-run")["global_step"] == 2


@pytest.mark.e2e
def test_any_other_backbone_is_trained_and_exported_by_its_name_alone(command, tmp_path):
    words = ["recipe=dino", "backbone.name=test_resnet", "dry_run=true", "output_dir=run", "evaluate_images=300"]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run-dry-run"
    state = checkpoint_of(run)["state_dict"]
    exported = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True, num_classes=0).state_dict()
    assert all(torch.equal(value, state[f"teacher.backbone.model.{name}"]) for name, value in exported.items())
    check_figures(run, "neighbors", "patch_features", "learning_curve", "health")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=mae", "backbone.name=resnet18"], "choose a plain ViT"),
        (["recipe=mea"], "Did you mean recipe=mae?"),
        pytest.param(
            ["recipe=dino", "backbone.name=beit_base_patch16_224"], "local_size=32", marks=pytest.mark.thorough
        ),
        pytest.param(["recipe=mae", "mask_ratio=1.5"], "mask_ratio=1.5 is out of range", marks=pytest.mark.thorough),
        pytest.param(["recipe=mae", "lr=abc"], "lr=abc is not a number", marks=pytest.mark.thorough),
    ],
)
def test_a_wrong_word_ends_with_code_2_and_one_message(words, message, warm_command, tmp_path):
    done = warm_command(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
    assert not (tmp_path / "outputs").exists()


@pytest.mark.e2e
def test_a_sweep_runs_every_point_in_a_folder_of_its_own(command, tiny_settings, tmp_path):
    words = ["-m", "recipe=mae", "mask_ratio=0.5,0.75", "output_dir=sweep", "dry_run=true", *tiny_settings("mae")]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ratios = [
        yaml.safe_load(file.read_text())["method"]["mask_ratio"] for file in sorted(tmp_path.glob("sweep*/config.yaml"))
    ]
    assert ratios == [0.5, 0.75]


@pytest.mark.parametrize(
    "recipe", [pytest.param("mae", marks=pytest.mark.slow), pytest.param("dino", marks=pytest.mark.e2e)]
)
def test_two_processes_and_two_accumulated_batches_train_as_one(recipe, command, tiny_settings, run_tiny, tmp_path):
    exact = "trainer.precision=64-true"
    run_tiny(tmp_path / "one", exact, recipe=recipe)
    run_tiny(tmp_path / "accumulated", exact, "trainer.accumulate_grad_batches=2", recipe=recipe)
    words = [f"recipe={recipe}", "output_dir=two", "trainer.devices=2", "trainer.strategy=ddp", exact]
    done = command(*words, *tiny_settings(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("global batch") == 1
    assert "148 x 2 device(s)" in done.stdout
    one, *others = (checkpoint_of(tmp_path / name)["state_dict"] for name in ("one", "two", "accumulated"))
    for name, value in one.items():
        assert value.dtype == torch.float64
        for other in others:
            assert (value - other[name]).abs().max() <= 1e-9, name
    losses, *others = (
        [float(row["loss"]) for row in table(tmp_path / name / "metrics.csv") if row["loss"]]
        for name in ("one", "two", "accumulated")
    )
    assert len(losses) == 8
    assert all(other == pytest.approx(losses, abs=1e-7) for other in others)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    names = ["knn_top1", "linear_top1", "rankme", "untrained_knn_top1", "pixels_knn_top1", "held_out_images"]
    for name in names:  # both processes have encoded images
        assert two[name] == pytest.approx(one[name], abs=0.1), name
