"""Fine-tuning from end to end: what is trained, what is kept still, what is kept, and what is said of it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from sslvision.backbones.build import build_backbone
from sslvision.cli.recipes import FINETUNE
from sslvision.data.sources.digits import open_digits
from sslvision.data.sources.folder import open_folder
from sslvision.errors import DataError, UsageError
from sslvision.methods.supervised import Supervised
from sslvision.runs.metrics import read_metrics
from sslvision.workflows import finetuning
from sslvision.workflows.labeled_data import labeled_sources

# Eight updates, the largest part of which is not training.
SHORT = (
    "data=digits",
    "epochs=0",
    "min_updates=8",
    "evaluations=4",
    "scratch_longer=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
)


@pytest.fixture(scope="session")
def finetune(settings_of, tiny_run):
    """Fine-tune the tiny run: finetune(folder, "key=value", ...) -> results."""

    def run(folder, *words):
        given = {word.split("=")[0] for word in words}
        kept = [word for word in (f"run={tiny_run}", *SHORT) if word.split("=")[0] not in given]
        return finetuning.finetune(settings_of("finetune", *kept, *words), folder, words)

    return run


@pytest.fixture(scope="module")
def finished(finetune, tmp_path_factory):
    """A finished fine-tuning with its lower half frozen: its folder and what it returned."""
    folder = tmp_path_factory.mktemp("finetuned") / "finished"
    return folder, finetune(folder)


def test_the_run_folder_explains_itself_and_scratch_stands_beside(finished, tiny_run):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results
    for arm in ("fine_tuned", "frozen_features", "from_scratch"):
        low, high = results[arm]["top1_interval"]
        assert 0 <= low <= results[arm]["top1"] <= high <= 100
        assert set(results[arm]["per_class"]) == set("0123456789")
    assert results["fine_tuned"]["top1"] > results["from_scratch"]["top1"] + 20  # eight updates teach little
    readme = (folder / "README.md").read_text()
    for file in ("results.json", "metrics.csv", "config.yaml", "environment.json", "checkpoints/last.ckpt"):
        assert file in readme
        assert (folder / file).exists()
    for name in ("confusion", "learning_curve_fine_tuned", "learning_curve_from_scratch"):
        with Image.open(folder / "figures" / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_the_rate_is_a_tenth_of_pretrainings_and_scratch_has_all_of_it(finished):
    _, results = finished
    base_lr = 16e-3  # of recipe=mae, per 256 images
    assert results["fine_tuned"]["lr"] == pytest.approx(0.1 * base_lr * 64 / 256)
    assert results["from_scratch"]["lr"] == pytest.approx(base_lr * 64 / 256)


def test_plain_timm_loads_the_classifier_and_it_scores_what_the_results_say(finished):
    folder, results = finished
    model = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == list("0123456789")
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    test = open_digits().test
    with torch.no_grad():
        predicted = model((test.images / 255 - mean) / std).argmax(1)
    assert 100 * float((predicted == test.labels).float().mean()) == pytest.approx(
        results["fine_tuned"]["top1"], abs=0.2
    )


@pytest.mark.thorough
def test_the_second_stage_starts_from_the_head_of_the_first(finetune, tmp_path, monkeypatch):
    heads = {}
    fit_head = finetuning.fit_head

    def remember(*args, **options):
        heads["fitted"], scores = fit_head(*args, **options)
        return heads["fitted"], scores

    def look(self):
        heads.setdefault(
            "at the start", [p.detach().clone() for p in self.backbone.model.get_classifier().parameters()]
        )

    monkeypatch.setattr(finetuning, "fit_head", remember)
    monkeypatch.setattr(Supervised, "on_train_start", look)
    finetune(tmp_path / "run", "scratch=false", "labels_per_class=20")
    for fitted, begun in zip(heads["fitted"], heads["at the start"], strict=True):
        assert torch.equal(fitted, begun)


@pytest.mark.thorough
def test_scratch_and_pretrained_see_the_same_images_in_the_same_order(finetune, tmp_path, monkeypatch):
    seen, views = [], Supervised.views

    def look(self, batch, rng):
        seen.append((batch.shown.clone(), batch.crops[0].clone()))
        return views(self, batch, rng)

    monkeypatch.setattr(Supervised, "views", look)
    finetune(tmp_path / "run", "head_first=false")
    assert len(seen) == 16
    for pretrained, scratch in zip(seen[:8], seen[8:], strict=True):
        assert torch.equal(pretrained[0], scratch[0])
        assert torch.equal(pretrained[1], scratch[1])


@pytest.mark.thorough
def test_the_frozen_blocks_leave_as_they_came(finetune, tiny_run, tmp_path):
    finetune(
        tmp_path / "run", "freeze=1", "scratch=false", "head_first=false", "lr=0.01", "backbone.drop_path_rate=0.5"
    )
    before = load_file(tiny_run / "export" / "model.safetensors")
    after = load_file(tmp_path / "run" / "export" / "model.safetensors")
    for name, value in before.items():
        frozen = not name.startswith("norm.")  # its one block is the lowest
        assert torch.equal(after[name], value) == frozen, name
    assert after["head.weight"].shape == (10, 32)


def test_training_stops_early_and_what_is_exported_validated_best(finetune, tmp_path, capsys):
    results = finetune(tmp_path / "run", "min_updates=40", "evaluations=40", "patience=2", "lr=1.0", "scratch=false")
    validated = [top1 for top1 in read_metrics(tmp_path / "run" / "metrics.csv")["val_top1"] if top1 is not None]
    assert len(validated) < 40
    assert results["validation_top1"] == pytest.approx(max(validated))
    assert max(validated) > validated[-1]  # so the last weights were not the best
    # At this rate no update helps: what came out is the network before the first one, with its fitted head.
    assert results["fine_tuned"]["top1"] == results["frozen_features"]["top1"] > 50
    assert results["best_update"] == 0
    assert "After every update the validation accuracy is lower" in capsys.readouterr().out


@pytest.mark.parametrize("holdout", [0.1, pytest.param(0.0, marks=pytest.mark.e2e)])
def test_a_run_that_broke_goes_on_as_if_it_had_not(holdout, finetune, tmp_path, monkeypatch):
    words = ("head_first=false", "lr=0.01", "scratch=false", f"holdout={holdout}", "ema=0.9")
    whole = finetune(tmp_path / "whole", *words)
    after_update = Supervised.after_update

    def breaks(self, clock):
        after_update(self, clock)
        if clock.step == 5:
            raise KeyboardInterrupt("pulled the plug")

    monkeypatch.setattr(Supervised, "after_update", breaks)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        finetune(tmp_path / "run", *words, "resume=auto")
    monkeypatch.undo()
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] in (4, 6)
    again = finetune(tmp_path / "run", *words, "resume=auto")
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    one, other = (load_file(tmp_path / run / "export" / "model.safetensors") for run in ("whole", "run"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.thorough
def test_a_run_that_was_done_comes_out_the_same_when_resumed(finished, finetune, tmp_path):
    folder, results = finished
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "results.json").unlink()
    again = finetune(tmp_path / "copy", "resume=auto")
    assert {**again, "seconds": 0} == {**results, "seconds": 0}


@pytest.mark.thorough
def test_labels_per_class_bound_what_is_learnt_and_validated_by(finetune, tmp_path, capsys):
    finetune(tmp_path / "run", "labels_per_class=5", "holdout=0.2", "scratch=false")
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "40 for training, 10 for validation, 599 for testing" in told


@pytest.mark.parametrize("name", ["test_resnet", pytest.param("test_convnext", marks=pytest.mark.e2e), "swin"])
def test_other_networks_are_fine_tuned_with_their_lower_half_frozen(name, finetune, tmp_path):
    if name == "swin":
        words = ["run=swin_tiny_patch4_window7_224", "backbone.embed_dim=16", "backbone.depths=[1,1]"]
        words += ["backbone.num_heads=[2,2]", "backbone.window_size=4", "backbone.patch_size=4"]
    else:
        words = [f"run={name}"]
    words += ["backbone.pretrained=false", "backbone.image_size=32", "backbone.channels=1", "freeze=0.5", "lr=0.01"]
    results = finetune(tmp_path / "run", *words)
    assert "from_scratch" not in results  # it is from scratch itself
    assert timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True).num_classes == 10


@pytest.mark.parametrize("recipe", FINETUNE.recipes)
def test_every_recipe_is_a_classifier_of_the_runs_backbone(recipe, settings_of, tiny_run):
    settings = settings_of("finetune", f"recipe={recipe}", f"run={tiny_run}", "data=digits")
    assert settings.compare == (recipe == "compare")
    with torch.device("meta"):
        backbone = build_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8)
        method = Supervised(backbone, classes=["a", "b"], labels=torch.tensor([0, 1], device="cpu"), **settings.method)
    assert method.backbone.model.get_classifier().out_features == 2


@pytest.mark.parametrize(
    "recipe",
    ["default", *(pytest.param(name, marks=pytest.mark.e2e) for name in FINETUNE.recipes if name.startswith("mae"))],
)  # compare: test_comparison.py
def test_every_recipe_takes_two_steps_through_the_real_command_line(recipe, warm_command, tiny_run, tmp_path):
    words = (f"recipe={recipe}", f"run={tiny_run}", "data=digits", "batch_size=16", "dry_run=true", "name=a")
    done = warm_command(*words, "trainer.accelerator=cpu", of="finetune", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "outputs" / "a-dry-run" / "results.json").read_text())
    assert results["updates"] == 2
    assert "fine-tuned" in done.stdout


@pytest.mark.e2e
def test_two_processes_train_as_one(finetune, command, tiny_run, tmp_path):
    words = ("scratch=false", "trainer.precision=64-true", "head_first=false", "lr=0.003")
    one = finetune(tmp_path / "one", *words)
    kept = [word for word in SHORT if word.split("=")[0] != "trainer.precision"]
    two = ("trainer.devices=2", "trainer.strategy=ddp", "name=two")
    done = command(f"run={tiny_run}", *kept, *words, *two, of="finetune", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    states = [
        load_file(run / "export" / "model.safetensors") for run in (tmp_path / "one", tmp_path / "outputs" / "two")
    ]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-9, msg=name)
    results = json.loads((tmp_path / "outputs" / "two" / "results.json").read_text())
    assert results["fine_tuned"] == one["fine_tuned"]
    assert results["validation_top1"] == one["validation_top1"]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["run=null"], UsageError, "run is not given"),
        (["freezze=1"], UsageError, "Did you mean method.freeze"),
        (["labels_per_class=[1,2]"], UsageError, "several are for compare=true"),
        (["labels_per_class=0"], UsageError, "above 0"),
        (["labels_per_class=5000"], DataError, "5,?000"),
        (["optimizer=adamv"], UsageError, "Near it: adam"),
        (["mixup=2"], UsageError, "mixup"),
        (["freeze=9"], UsageError, "1"),
        (["holdout=0.9"], UsageError, "holdout=0.9"),
        (["resume=some.ckpt"], UsageError, "resume=auto"),
        (["trainer.max_epochs=3"], UsageError, "epochs"),
        (["epochs=0", "min_updates=0"], UsageError, "nothing to do"),
        (["randaugment=31"], UsageError, "31"),
        (["scratch_warmup=1"], UsageError, "scratch_warmup=1.0 must be a fraction"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_folder_is_made(words, error, message, finetune, tmp_path):
    with pytest.raises(error, match=message):
        finetune(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_of_one_image_a_class_none_is_held_out_and_the_run_says_so(settings_of, tiny_run):
    settings = settings_of("finetune", f"run={tiny_run}", "data=digits", "labels_per_class=1")
    labeled = finetuning.open_labeled_data(settings)
    assert (len(labeled.train), labeled.validation) == (10, None)
    assert "none is held out to choose weights" in labeled.remarks[-1]


def test_images_without_labels_are_refused(finetune, tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(20):
        Image.new("L", (32, 32), number).save(tmp_path / "flat" / f"{number}.png")
    with pytest.raises(DataError, match="no labels to learn"):
        finetune(tmp_path / "run", "data=folder", f"data.root={tmp_path / 'flat'}")


@pytest.mark.thorough
def test_a_folder_with_broken_images_is_learnt_and_they_are_named(finetune, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name, level in (("dark", 40), ("light", 200)):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(-30, 30, (40, 50, 3))
                Image.fromarray((level + noise).astype(np.uint8)).save(
                    tmp_path / "photos" / split / name / f"{number}.png"
                )
    (tmp_path / "photos" / "train" / "dark" / "broken.png").write_bytes(b"\x89PNG but not more")
    words = (
        "data=folder",
        f"data.root={tmp_path / 'photos'}",
        "data.workers=0",
        "batch_size=8",
        "data.max_unreadable=0.5",
    )
    results = finetune(tmp_path / "run", *words, "min_updates=20", "scratch=false")
    assert results["fine_tuned"]["top1"] == 100
    assert "broken.png" in (tmp_path / "run" / "unreadable.csv").read_text()


def two_classes(root, *folders, each=10):
    """Write dark and light images into the class folders of each of the folders."""
    for folder in folders:
        for name, level in (("dark", 40), ("light", 200)):
            (root / folder / name).mkdir(parents=True)
            for number in range(each):
                noise = np.random.default_rng(number).integers(-30, 30, (32, 32))
                Image.fromarray((level + noise).astype(np.uint8)).save(root / folder / name / f"{number}.png")


def test_without_labeled_test_images_some_are_set_aside_and_never_chosen_by(finetune, tmp_path):
    two_classes(tmp_path / "photos", "")
    splits = open_folder(tmp_path / "photos", channels=1, holdout=0)
    unlabeled = open_folder(tmp_path / "photos" / "dark", channels=1, holdout=0).train
    for test, told in ((None, ""), (unlabeled, ", only 10 without labels, which are not used")):
        settings = settings_for_labels(holdout=0.2)
        given = splits._replace(test=test)
        train, validation, tested, remarks = labeled_sources(given, settings, validate_on=100)
        files = [{source.describe(index) for index in range(len(source))} for source in (train, validation, tested)]
        assert [len(names) for names in files] == [12, 4, 4]
        assert len(set.union(*files)) == 20
        assert remarks == (
            f"There are no labeled test images{told}: 4 of 20 training images (20 %), drawn class by class, are set aside for "
            "testing (holdout=0.2).",
        )
    with pytest.raises(DataError, match="no labeled images for testing"):
        labeled_sources(splits, settings_for_labels(holdout=0.0), validate_on=100)


def settings_for_labels(holdout):
    return SimpleNamespace(holdout=holdout, seed=0, labels_per_class=None, compare=False)


@pytest.mark.thorough
def test_what_was_left_out_stands_in_the_findings(finetune, tmp_path, capsys):
    root = tmp_path / "photos"
    two_classes(root, "train", each=20)
    two_classes(tmp_path / "more", "")
    (root / "val").symlink_to(tmp_path / "more" / "dark")  # flat
    (tmp_path / "more" / "dark" / "notes.txt").touch()
    words = ("data=folder", f"data.root={root}", "data.workers=0", "min_updates=2", "scratch=false", "data.holdout=0.2")
    results = finetune(tmp_path / "run", *words)
    assert results["findings"] == [
        "Left out: 1 of 51 files (1.96 %), not being images that can be read: 1 .txt.",
        "10 of 50 images (20 %) in val/ have no labels, for want of class folders, and are not used. Scores are measured on "
        "8 of 40 images (20 %) of train/, held out from training (data.holdout).",
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert all(printed.index(finding) < printed.index("Linear head") for finding in results["findings"])


def test_a_used_folder_is_refused(finished, finetune, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "used")
    with pytest.raises(UsageError, match="is in use"):
        finetune(tmp_path / "used")


@pytest.mark.thorough
def test_the_classifier_and_its_scores_are_written_before_the_comparison_from_scratch(finetune, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "train_from_scratch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path / "run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results.keys() >= {"fine_tuned", "frozen_features", "best_update"}
    assert "from_scratch" not in results
    assert timm.create_model(f"local-dir:{tmp_path / 'run/export'}", pretrained=True).num_classes == 10
    assert (tmp_path / "run/figures/confusion.png").is_file()
