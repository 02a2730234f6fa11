"""trainer.strategy=fsdp2 on CPU processes trains as one process does, and any number of them goes on from its checkpoints."""

import copy
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file
from warm_process import _main, _run, start_processes, train_only

from sslvision import DINO
from sslvision.backbones.load import load_backbone
from sslvision.errors import UsageError
from sslvision.runs.weights import load_weights
from sslvision.system.checkpoint_folders import read_folder, remove

VIT = ["backbone.depth=2"]
SWIN = [
    "backbone.name=swin_tiny_patch4_window7_224",
    "backbone.image_size=32",
    "backbone.window_size=4",
    "backbone.drop_path_rate=0",  # its random numbers are those of a process
    "backbone.patch_size=2",
    "backbone.embed_dim=12",
    "backbone.depths=[2,2]",
    "backbone.num_heads=[1,2]",
]
EXACT = ["optimizer=adamw", "trainer.precision=64-true", "dry_run=false", "knn_every_epochs=0"]


@pytest.fixture
def train(tiny_settings, tmp_path):
    """Train a tiny recipe, in one process or several, and return its checkpoint: train("name", "mae", "key=value", ...)."""

    def call(name, recipe, *words, processes=1, strategy="fsdp2", evaluate=False):
        words = [*EXACT, *words]
        later = {word.split("=")[0]: word for word in [*tiny_settings(recipe), *words]}  # the last one counts
        given, tiny = {word.split("=")[0] for word in words}, list(later.values())
        if "backbone.name" in given:
            tiny = [word for key, word in later.items() if not key.startswith("backbone.") or key in given]
        words = [f"recipe={recipe}", f"output_dir={tmp_path / name}", *tiny]
        if processes > 1:
            words += [f"trainer.devices={processes}", f"trainer.strategy={strategy}", "timeout=300"]
        how = (_main, ("pretrain", words, str(tmp_path))) if evaluate else (train_only, (words, str(tmp_path)))
        start_processes(*how, tmp_path / f"log-{name}", processes)
        last = tmp_path / name / "checkpoints" / "last.ckpt"
        assert last.is_dir() == (processes > 1 and strategy == "fsdp2")
        return read_folder(last) if last.is_dir() else torch.load(last, map_location="cpu", weights_only=True)

    return call


def deviations(one, other):
    """Return the largest deviations of weights and buffers (DINO's center is one), and of the optimizer's state."""
    assert one["state_dict"].keys() == other["state_dict"].keys()
    weights = [(value - other["state_dict"][name]).abs().max() for name, value in one["state_dict"].items()]
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, other)]
    assert states[0].keys() == states[1].keys()
    moments = [
        (value - states[1][key][name]).abs().max()
        for key, values in states[0].items()
        for name, value in values.items()
    ]
    return max(weights).item(), max(moments).item()


def difference(one, other):
    return max(deviations(one, other))


def losses(run):
    rows = [row.split(",") for row in (run / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("loss")
    return [float(row[column]) for row in rows[1:] if row[column]]


@pytest.mark.e2e
@pytest.mark.parametrize("backbone", [VIT, SWIN], ids=["vit", "swin"])
@pytest.mark.parametrize("recipe", ["mae", "dino"])
def test_two_processes_with_shards_train_as_one(recipe, backbone, train):
    one = train("one", recipe, *backbone)
    two = train("two", recipe, *backbone, processes=2)
    assert one["global_step"] == two["global_step"] == 8
    assert all(value.dtype == torch.float64 for value in one["state_dict"].values() if value.is_floating_point())
    assert difference(one, two) <= 1e-9
    assert one["method"] == two["method"]  # the class of the method, not that of its shards


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [VIT, SWIN], ids=["vit", "swin"])
@pytest.mark.parametrize("recipe", ["mae", "dino"])
def test_ddp_and_shards_of_two_and_four_processes_train_as_one(recipe, backbone, train, tmp_path, capsys):
    one, told = train("one", recipe, *backbone), []
    assert len(losses(tmp_path / "one")) == 8
    for strategy, processes in (("ddp", 2), ("fsdp2", 2), ("fsdp2", 4)):
        name = f"{strategy}-{processes}"
        other = train(name, recipe, *backbone, processes=processes, strategy=strategy)
        of_weights, of_moments = deviations(one, other)
        pairs = zip(losses(tmp_path / "one"), losses(tmp_path / name), strict=True)
        of_losses = max(abs(a - b) for a, b in pairs)
        center = [checkpoint["state_dict"]["center"] for checkpoint in (one, other)] if recipe == "dino" else []
        of_center = (center[0] - center[1]).abs().max().item() if center else 0.0
        told.append(
            f"{recipe} {name}: weights {of_weights:.1e}, optimizer {of_moments:.1e}, losses {of_losses:.1e}, "
            f"center {of_center:.1e}"
        )
        assert max(of_weights, of_moments, of_losses, of_center) <= 1e-9, told
    with capsys.disabled():
        print("", *told, sep="\n")


def keep_first_epoch(folder):
    """Delete the checkpoints of the later epochs."""
    for name in ("last.ckpt", "last-2.ckpt"):
        path = folder / "checkpoints" / name
        if path.exists():
            remove(path)


@pytest.mark.e2e
def test_a_run_in_shards_goes_on_in_one_process_and_back_within_the_freeze_of_prototypes(train, tmp_path):
    """While prototypes are frozen, the optimizer has no state for them."""
    words = ["freeze_prototypes_epochs=2", *VIT]
    one = train("one", "dino", *words)
    train("two", "dino", *words, processes=2)
    for name, of, processes in (("from-two", "two", 1), ("from-one", "one", 2)):
        shutil.copytree(tmp_path / of, tmp_path / name)
        keep_first_epoch(tmp_path / name)
        recomputed = f"activation_checkpointing={'true' if processes == 2 else 'false'}"
        resumed = train(name, "dino", *words, "resume=auto", recomputed, processes=processes)
        assert resumed["global_step"] == 8
        assert difference(one, resumed) <= 1e-9, name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mae", "dino"])
def test_a_checkpoint_of_four_processes_goes_on_in_one_two_three_and_exactly_in_four(recipe, train, tmp_path):
    words = [*VIT, "batch_size=288"]
    whole = train("whole", recipe, *words, processes=4)
    for processes in (1, 2, 3, 4):
        name = f"in-{processes}"
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        keep_first_epoch(tmp_path / name)
        resumed = train(name, recipe, *words, "resume=auto", processes=processes)
        assert resumed["global_step"] == whole["global_step"] == 8
        assert difference(whole, resumed) <= (0 if processes == 4 else 1e-9), name
        if processes == 4:
            assert resumed["loops"] == whole["loops"]
            assert resumed["log"] == whole["log"]


@pytest.mark.e2e
def test_evaluation_on_the_way_and_pictures_see_the_whole_weights_and_clipping_the_whole_norm(train, tmp_path):
    words = [*VIT, "knn_every_epochs=1", "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.01"]
    one = train("one", "mae", *words, evaluate=True)
    assert difference(one, train("two", "mae", *words, processes=2, evaluate=True)) <= 1e-9
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "two")]
    head = rows[0][0].split(",")
    values = [[row.split(",")[head.index("rankme")] for row in table[1:]] for table in rows]
    measured = [[float(value) for value in column if value] for column in values]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)
    assert measured[0]
    assert (tmp_path / "two" / "figures" / "reconstructions.png").is_file()
    assert (tmp_path / "two" / "export").is_dir()


@pytest.mark.e2e
def test_every_command_reads_the_shards_of_a_run_that_has_not_ended(train, warm_command, tmp_path):
    run, export = tmp_path / "run", tmp_path / "exported"
    checkpoint = train("run", "dino", *VIT, "trainer.precision=32-true", processes=2)
    assert not (run / "export").exists()
    done = warm_command(f"run={run}", f"output_dir={export}", of="export", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    written = load_file(export / "model.safetensors")
    prefix = "teacher.backbone.model."
    assert written.keys() == {name.removeprefix(prefix) for name in checkpoint["state_dict"] if name.startswith(prefix)}
    for name, value in written.items():
        assert torch.equal(value, checkpoint["state_dict"][prefix + name])
    timm.create_model(f"local-dir:{export}", pretrained=True, num_classes=3)
    last = run / "checkpoints" / "last.ckpt"
    assert timm.models.load_state_dict(str(export / "model.safetensors")).keys() == written.keys()
    method = DINO.load_from_checkpoint(last)
    assert torch.equal(method.center, checkpoint["state_dict"]["center"])
    for path in (run, last):  # as init_from=
        loaded, _ = load_weights(copy.deepcopy(method), path)
        assert str(last) in loaded
    with pytest.raises(UsageError, match=r"checkpoint of a run: give the run's folder"):
        load_backbone(last)
    (last / "meta.pt").unlink()
    assert "last-1.ckpt" in load_backbone(run).weights


SKIPPING = """
import os, torch, torch.distributed as dist
from torch import nn
from sslvision.nn.ema import update_ema
from sslvision.nn.shards import shard_module
from sslvision.optim.nonfinite import skip_nonfinite

dist.init_process_group("gloo")
rank = dist.get_rank()
for fused in (True, False):
    torch.manual_seed(rank)  # the weights of the first process are everyone's
    network, teacher = (nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)).double() for _ in range(2))
    mesh = dist.init_device_mesh("cpu", (2,))
    for one in (network, teacher):
        shard_module(one, list(one), mesh)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused, weight_decay=0.0)
    torch.manual_seed(7)
    network(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    whole = torch.cat([gradient.full_tensor().flatten() for gradient in gradients])
    norm, norms = skip_nonfinite(optimizer, gradients)
    torch.testing.assert_close(norm, whole.norm())
    torch.testing.assert_close(torch.stack([*norms]).norm(), whole.norm())
    before = [parameter.full_tensor().clone() for parameter in network.parameters()]
    if rank == 1:
        gradients[0].to_local()[0, 0] = float("nan")
    norm, _ = skip_nonfinite(optimizer, gradients)
    optimizer.step()
    assert not norm.isfinite()
    for old, parameter in zip(before, network.parameters(), strict=True):
        assert torch.equal(old, parameter.full_tensor())
    was = [parameter.full_tensor().clone() for parameter in teacher.parameters()]
    update_ema(teacher, network, 0.75)
    for old, now, student in zip(was, teacher.parameters(), before, strict=True):
        torch.testing.assert_close(now.full_tensor(), 0.75 * old + 0.25 * student)
print("same in both")
"""


@pytest.mark.thorough
def test_a_gradient_that_is_not_finite_in_one_shard_skips_the_update_in_both_processes(tmp_path):
    assert all("same in both" in said for said in start_processes(_run, (SKIPPING,), tmp_path, 2))
