"""dry_run=plan: what a device holds and sends, and the largest batch, before there is a device."""

import pytest

from sslvision.errors import UsageError
from sslvision.workflows.planning import choice, plan, world_of


@pytest.fixture
def planned(settings_of, tiny_settings):
    """Plan a tiny recipe: planned("mae", "key=value", ...) -> results."""

    def call(recipe, *words):
        given = {word.split("=")[0] for word in words}
        kept = [w for w in tiny_settings(recipe) if w.split("=")[0] not in {*given, "trainer.accelerator"}]
        if "backbone.name" in given:
            kept = [w for w in kept if not w.startswith("backbone.")]
        return plan(settings_of("pretrain", f"recipe={recipe}", *kept, *words))

    return call


def test_a_plan_for_gpus_that_are_not_there_leaves_nothing_on_the_disk(planned, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = planned("mae", "trainer.devices=4", "trainer.num_nodes=2", "optimizer=adamw", "plan_gb=0.5")
    assert found["world"] == {
        **{"device": "cuda", "devices": 8, "nodes": 2, "strategy": "ddp", "precision": "bf16-mixed"},
        **{"accumulate": 1, "images": 37},
    }
    assert found["plans"].keys() == {"ddp", "fsdp2", "ddp, recomputed", "fsdp2, recomputed"}
    for one in found["plans"].values():
        assert sum(one["held"].values()) == one["peak"]
        assert one["largest_batch"] > 37
    assert found["plans"]["fsdp2"]["held"]["gradients"] < found["plans"]["ddp"]["held"]["gradients"]
    assert found["plans"]["ddp, recomputed"]["largest_batch"] > found["plans"]["ddp"]["largest_batch"]
    assert found["choice"] == "trainer.strategy=ddp, batches of 37 per device."
    told = capsys.readouterr().out
    assert "8 GPUs on 2 nodes, bf16-mixed; 296 images = 37 x 8 x 1 accumulated" in told
    assert "Computed, not measured" in told
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.devices=5"], "cannot be shared evenly by 5 device.* a multiple of 5"),
        (["trainer.strategy=deepspeed"], "knows trainer.strategy=ddp and fsdp2, not deepspeed"),
        (["trainer.precision=8"], "does not know trainer.precision=8"),
        (["trainer.devices=zero"], "trainer.devices=zero is no number of devices"),
        (["trainer.accelerator=mps"], "for GPUs and CPUs, not for trainer.accelerator=mps"),
        (["dry_run=paln"], "dry_run=paln is unknown: it is true, false or plan"),
        (["plan_gb=0"], "plan_gb=0.* must be a number above 0"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(words, message, settings_of):
    with pytest.raises(UsageError, match=message):
        world_of(settings_of("pretrain", "recipe=mae", "batch_size=64", *words))


def world(settings_of, *words):
    return world_of(settings_of("pretrain", "recipe=mae", *words))


def test_devices_are_counted_as_the_trainer_counts_them(settings_of):
    def devices(*words):
        found = world(settings_of, "batch_size=64", *words)
        return found.devices, found.strategy, found.images

    assert devices("trainer.accelerator=cpu") == (1, "one process", 64)
    assert devices("trainer.devices=[0,1]", "trainer.accumulate_grad_batches=2") == (2, "ddp", 16)
    assert devices("trainer.devices=8", "trainer.num_nodes=4", "trainer.strategy=fsdp2") == (32, "fsdp2", 2)


def test_the_choice_is_the_first_that_fits(settings_of):
    of = world(settings_of, "trainer.devices=8", "batch_size=512")  # 64 per device

    def chosen(**largest):
        named = {name.replace("_recomputed", ", recomputed"): {"largest_batch": n} for name, n in largest.items()}
        return choice(named, of)

    assert chosen(ddp=64, fsdp2=100).startswith("trainer.strategy=ddp, batches of 64")
    assert chosen(ddp=63, fsdp2=64, ddp_recomputed=90).startswith("trainer.strategy=fsdp2, batches")
    assert chosen(ddp=0, fsdp2=10, ddp_recomputed=90).startswith("trainer.strategy=ddp with activation_checkpointing")
    assert "accumulate_grad_batches=4, batches of 16" in chosen(ddp=0, fsdp2=10, fsdp2_recomputed=20)
    assert chosen(ddp=0, fsdp2=0).startswith("nothing fits, not even one image: take more devices")


@pytest.mark.e2e
def test_dino_and_networks_of_timm_are_planned_for_too(planned):
    found = planned("dino", "backbone.name=test_resnet", "trainer.devices=2", "optimizer=adamw")
    assert found["plans"]["fsdp2"]["held"]["weights, not trained (EMA teacher)"] > 0


@pytest.mark.e2e
def test_from_the_command_line_and_as_a_function(warm_command, tiny_settings, tmp_path):
    words = [word for word in tiny_settings("mae") if not word.startswith("trainer.accelerator")]
    done = warm_command("recipe=mae", "dry_run=plan", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "largest batch that fits" in done.stdout
    assert not (tmp_path / "outputs").exists()
