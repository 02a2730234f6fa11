"""trainer.strategy=fsdp2 on two CPU processes trains as one process does, and its checkpoints are those of one process."""

import os
import shutil
import socket

import pytest
import torch
from warm_process import CONTEXT, _main, _run

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
SHARDED = ["trainer.devices=2", "trainer.strategy=fsdp2", "timeout=60"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start_two(target, arguments, log):
    """Call `target` in two forked processes as ranks 0 and 1, and return what each said, once both have ended."""
    common = {**os.environ, "COLUMNS": "200", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    processes, streams = [], []
    for rank in range(2):
        (log / str(rank)).mkdir(parents=True, exist_ok=True)
        streams.append([log / str(rank) / name for name in ("stdout", "stderr")])
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        processes.append(CONTEXT.Process(target=target, args=(*arguments, streams[-1], environment)))
        processes[-1].start()
    for process in processes:
        process.join(400)
    said = ["".join(stream.read_text() for stream in of_rank) for of_rank in streams]
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0], said
    return said


@pytest.fixture
def train(tiny_settings, warm_command, tmp_path):
    """Train a tiny recipe, in one process or two, and return its checkpoint: train("name", "mae", "key=value", ...)."""

    def call(name, recipe, *words, two=False):
        words = [*EXACT, *words]
        later = {word.split("=")[0]: word for word in [*tiny_settings(recipe), *words]}  # the last one counts
        given, tiny = {word.split("=")[0] for word in words}, list(later.values())
        if "backbone.name" in given:
            tiny = [word for key, word in later.items() if not key.startswith("backbone.") or key in given]
        words = [f"recipe={recipe}", f"output_dir={tmp_path / name}", *tiny]
        if two:
            start_two(_main, ("pretrain", [*words, *SHARDED], str(tmp_path)), tmp_path / f"log-{name}")
        else:
            done = warm_command(*words, cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
        return torch.load(tmp_path / name / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)

    return call


def difference(one, other):
    """Return the largest deviation of weights and of the optimizer's state."""
    assert one["state_dict"].keys() == other["state_dict"].keys()
    found = [(value - other["state_dict"][name]).abs().max() for name, value in one["state_dict"].items()]
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key, values in states[0].items():
        found += [(value - states[1][key][name]).abs().max() for name, value in values.items()]
    return max(found).item()


@pytest.mark.e2e
@pytest.mark.parametrize("backbone", [VIT, SWIN], ids=["vit", "swin"])
@pytest.mark.parametrize("recipe", ["mae", "dino"])
def test_two_processes_with_shards_train_as_one(recipe, backbone, train):
    one = train("one", recipe, *backbone)
    two = train("two", recipe, *backbone, two=True)
    assert one["global_step"] == two["global_step"] == 8
    assert all(value.dtype == torch.float64 for value in one["state_dict"].values() if value.is_floating_point())
    assert difference(one, two) <= 1e-9
    assert one["method"] == two["method"]  # the class of the method, not that of its shards


@pytest.mark.e2e
def test_a_run_in_shards_goes_on_in_one_process_and_back_within_the_freeze_of_prototypes(train, tmp_path):
    """While prototypes are frozen, the optimizer has no state for them."""
    words = ["freeze_prototypes_epochs=2", *VIT]
    one = train("one", "dino", *words)
    train("two", "dino", *words, two=True)
    for name, of, two in (("from-two", "two", False), ("from-one", "one", True)):
        shutil.copytree(tmp_path / of, tmp_path / name)
        for file in ("last.ckpt", "last-2.ckpt"):  # what is left is of the first epoch
            (tmp_path / name / "checkpoints" / file).unlink(missing_ok=True)
        recomputed = f"activation_checkpointing={'true' if two else 'false'}"
        resumed = train(name, "dino", *words, "resume=auto", recomputed, two=two)
        assert resumed["global_step"] == 8
        assert difference(one, resumed) <= 1e-9, name


@pytest.mark.e2e
def test_evaluation_on_the_way_and_pictures_see_the_whole_weights_and_clipping_the_whole_norm(train, tmp_path):
    words = [*VIT, "knn_every_epochs=1", "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.01"]
    one = train("one", "mae", *words)
    assert difference(one, train("two", "mae", *words, two=True)) <= 1e-9
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "two")]
    head = rows[0][0].split(",")
    values = [[row.split(",")[head.index("rankme")] for row in table[1:]] for table in rows]
    measured = [[float(value) for value in column if value] for column in values]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)
    assert measured[0]
    assert (tmp_path / "two" / "figures" / "reconstructions.png").is_file()
    assert (tmp_path / "two" / "export").is_dir()


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
    assert all("same in both" in said for said in start_two(_run, (SKIPPING,), tmp_path))
