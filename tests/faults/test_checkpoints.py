"""Rows 5 to 10: a full disk, a kill while saving, cut-off and damaged checkpoints, and such as are made to do harm."""

import contextlib
import hashlib
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from sslvision.errors import Diverged, StorageError, UsageError
from sslvision.methods.mae import MAE
from sslvision.runs import checkpoint as checkpoints
from sslvision.runs.checkpoint import AtomicCheckpoints, newest_good
from sslvision.system.torch_files import load_verified, save

pytestmark = pytest.mark.faults

SLOW = "trainer.log_every_n_steps=50"  # nothing but checkpoints is written while the disk is full


def state(step, size=1000):
    return {"global_step": step, "state_dict": {"weight": torch.full((size,), float(step))}, "optimizer_states": []}


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def steps(folder):
    """The update that each checkpoint of a folder is from, by its name; all are whole."""
    return {file.name: load_verified(file)["global_step"] for file in sorted(folder.glob("*.ckpt"))}


@pytest.fixture(scope="module")
def finished(train_tiny, tmp_path_factory):
    """A finished run of eight updates, with checkpoints from 8, 6 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train_tiny(folder, "checkpoint_every_steps=3")
    assert steps(folder / "checkpoints") == {"last.ckpt": 8, "last-1.ckpt": 6, "last-2.ckpt": 4}
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def weights(folder):
    return load_verified(folder / "checkpoints" / "last.ckpt")["state_dict"]


def assert_as_if_nothing_had_been(folder, finished):
    state = weights(folder)
    assert [name for name, value in weights(finished).items() if not torch.equal(value, state[name])] == []
    assert (folder / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()


# Row 5: the disk is full.


@contextlib.contextmanager
def small_disk(folder):
    """Mount a disk of 4 MB."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the lock of the run in it is held


@contextlib.contextmanager
def small_files(folder):
    """Let no file grow beyond 100 kB, for anybody."""
    folder.mkdir()
    try:
        yield
    finally:
        lift_limit()


def lift_limit():
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def fill_up(folder):
    """Leave 64 kB of a small disk."""
    with open(folder / "thesis.tar", "wb", buffering=0) as file:
        file.write(bytes(shutil.disk_usage(folder).free - (64 << 10)))


def limit(folder):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))


@pytest.mark.parametrize(("disk", "fill"), [(small_disk, fill_up), (small_files, limit)])
def test_a_run_whose_disk_fills_up_ends_with_code_5_and_goes_on_from_the_checkpoint_before(
    disk, fill, finished, train_tiny, tmp_path, monkeypatch
):
    folder, after_update = tmp_path / "disk", MAE.after_update

    def fill_the_disk(self, clock):
        if clock.step == 5:
            fill(folder)
        after_update(self, clock)

    with disk(folder):
        with monkeypatch.context() as patched:
            patched.setattr(MAE, "after_update", fill_the_disk)
            with pytest.raises(StorageError) as caught:
                train_tiny(folder / "run", "checkpoint_every_steps=3", SLOW)
        lift_limit()
        saved = folder / "run" / "checkpoints"
        size, free = (saved / "last.ckpt").stat().st_size, shutil.disk_usage(folder).free
        assert caught.value.exit_code == 5
        assert f"{saved}/last.ckpt cannot be written" in str(caught.value)
        needed, left = (int(number.replace(",", "")) for number in numbers(str(caught.value)))
        assert 0.7 * size < needed < size  # the tensors; of a network this small the rest counts too
        report = sum(
            file.stat().st_size for file in (folder / "run").glob("*") if file.name in ("report.html", "stopped.json")
        )
        assert left == pytest.approx(free + report, rel=0.1, abs=8192)  # which is written after the error
        assert steps(saved) == {"last.ckpt": 4, "last-1.ckpt": 3}
        assert names(saved) == ["last-1.ckpt", "last.ckpt"]
        (folder / "thesis.tar").unlink(missing_ok=True)
        if disk is small_files:  # the run's other files are too many for 4 MB
            train_tiny(folder / "run", "checkpoint_every_steps=3", "resume=auto", SLOW)
            state = weights(folder / "run")
            assert all(torch.equal(value, state[name]) for name, value in weights(finished).items())


def numbers(message):
    return re.findall(r"([\d,]+)(?: bytes, and|, are free| are free)", message)


# Row 6: kill -9 during a save.


def at_half(kill):
    def write_half(content, file):
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[:2000])
        file.flush()
        kill()

    checkpoints.save = write_half


def before_the_flush(kill):
    os.fsync = lambda handle: kill()


def in_the_rotation(number):
    def patch(kill):
        replace, calls = os.replace, iter(range(9))

        def nth(*names):
            if next(calls) == number:
                kill()
            replace(*names)

        os.replace = nth

    return patch


def kill_at(patch, save):
    """Call `save` in a process that is killed by SIGKILL where `patch` says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks
        child = os.fork()
    if child == 0:
        try:
            patch(lambda: os.kill(os.getpid(), signal.SIGKILL))
            save()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("moment", [at_half, before_the_flush, *map(in_the_rotation, range(3))])
def test_a_kill_while_saving_leaves_the_checkpoint_before_whole(moment, tmp_path):
    file = tmp_path / "last.ckpt"
    for step in (1, 2, 3):
        AtomicCheckpoints().save_checkpoint(state(step), file)
    kill_at(moment, lambda: AtomicCheckpoints().save_checkpoint(state(4), file))
    found = newest_good(tmp_path)
    assert (found.head["global_step"], found.damaged) == (3, {})
    assert torch.equal(load_verified(found.path)["state_dict"]["weight"], torch.full((1000,), 3.0))
    AtomicCheckpoints().save_checkpoint(state(5), file)  # of the resumed run
    assert newest_good(tmp_path).head["global_step"] == 5
    assert set(steps(tmp_path).values()) >= {5, 3}
    assert not list(tmp_path.glob(".*")), "what the killed process left is gone"


# Rows 7 and 8: cut-off and damaged checkpoints.


def cut_off(file):
    os.truncate(file, file.stat().st_size // 2)


def cut_off_the_last_byte(file):
    os.truncate(file, file.stat().st_size - 1)


def empty(file):
    os.truncate(file, 0)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)


SPOILT = {
    cut_off: "has no valid archive index",
    cut_off_the_last_byte: "has no valid archive index",
    empty: "is empty",
    flip_a_bit: "is damaged",
}


@pytest.mark.parametrize("spoil", [cut_off, flip_a_bit])
def test_resuming_falls_back_to_the_newest_whole_checkpoint_and_says_so(spoil, run, finished, train_tiny, capsys):
    for name in ("last.ckpt", "last-1.ckpt"):
        spoil(run / "checkpoints" / name)
    results = train_tiny(run, "resume=auto", "checkpoint_every_steps=3")
    (finding,) = results["findings"]
    assert "last-2.ckpt (update 4)" in finding
    assert SPOILT[spoil] in finding
    assert all(str(run / "checkpoints" / name) in finding for name in ("last.ckpt", "last-1.ckpt"))
    assert capsys.readouterr().out.count(finding) == 1
    assert_as_if_nothing_had_been(run, finished)
    assert steps(run / "checkpoints") == {"last.ckpt": 8, "last-1.ckpt": 6, "last-2.ckpt": 4}
    assert {"last.ckpt.damaged", "last-1.ckpt.damaged"} <= set(names(run / "checkpoints"))


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_checkpoint_that_was_asked_for_is_refused_by_name(spoil, run, train_tiny, tmp_path):
    file = run / "checkpoints" / "last.ckpt"
    spoil(file)
    with pytest.raises(UsageError, match=f"{file} .*{SPOILT[spoil]}"):
        train_tiny(tmp_path / "other", f"resume={file}")
    assert not (tmp_path / "other").exists()


def test_a_run_without_a_whole_checkpoint_is_not_begun_again_unasked(run, train_tiny):
    for file in (run / "checkpoints").glob("*.ckpt"):
        flip_a_bit(file)
    with pytest.raises(UsageError, match=r"is damaged.*last.ckpt.*last-1.ckpt.*last-2.ckpt.*overwrite=true"):
        train_tiny(run, "resume=auto")
    assert len(list((run / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("bits", ["one of each byte", pytest.param("all", marks=pytest.mark.e2e)])
def test_every_single_flipped_bit_is_found_or_changes_nothing(bits, tmp_path):
    file = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint(state(7, size=4), file)
    whole = file.read_bytes()
    found = tried = 0
    with open(file, "r+b", buffering=0) as opened:
        for place, byte in enumerate(whole):
            for bit in range(8) if bits == "all" else [place % 8]:
                tried += 1
                os.pwrite(opened.fileno(), bytes([byte ^ (1 << bit)]), place)
                try:
                    loaded = load_verified(file)
                except UsageError:
                    found += 1
                else:  # padding, times, and what else has no effect
                    assert torch.equal(loaded["state_dict"].pop("weight"), torch.full((4,), 7.0)), (
                        f"bit {bit}, byte {place}"
                    )
                    assert loaded == {"global_step": 7, "state_dict": {}, "optimizer_states": [], "sslvision": {}}
            os.pwrite(opened.fileno(), bytes([byte]), place)
    assert found > tried / 2
    assert load_verified(file)["global_step"] == 7


def test_a_file_with_a_checksum_in_its_comment_of_an_earlier_version_is_read_and_verified(tmp_path):
    file = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint(state(7), file)
    content = file.read_bytes()
    comment = b"sslvision sha256 " + hashlib.sha256(content).hexdigest().encode()
    file.write_bytes(content[:-2] + len(comment).to_bytes(2, "little") + comment)
    assert load_verified(file)["global_step"] == 7
    cut_off_the_last_byte(file)
    with pytest.raises(UsageError, match="is damaged: it does not end where its archive does"):
        load_verified(file)


def test_weights_of_a_damaged_checkpoint_start_no_run(run, train_tiny, tmp_path):
    file = run / "checkpoints" / "last.ckpt"
    flip_a_bit(file)
    with pytest.raises(UsageError, match=f"{file} is damaged"):
        train_tiny(tmp_path / "other", f"init_from={file}")
    results = train_tiny(
        tmp_path / "next", f"init_from={run}", "lr=1e-12", "epochs=1"
    )  # of a folder the newest whole one
    assert results
    name = "backbone.model.blocks.0.mlp.fc1.weight"
    before = load_verified(run / "checkpoints" / "last-1.ckpt")["state_dict"]
    assert torch.allclose(weights(tmp_path / "next")[name], before[name], atol=1e-8)


def test_weights_that_another_program_saved_are_read(run, train_tiny, tmp_path):
    file = run / "checkpoints" / "last.ckpt"
    before = weights(run)
    torch.save(load_verified(file), file)
    train_tiny(tmp_path / "other", f"init_from={file}", "lr=1e-12", "epochs=1")
    name = "backbone.model.blocks.0.mlp.fc1.weight"
    assert torch.allclose(weights(tmp_path / "other")[name], before[name], atol=1e-8)


# Rows 9 and 10: checkpoints that are made to do harm.


class Harm:
    """What runs a command when it is unpickled."""

    def __init__(self, sign):
        self.sign = sign

    def __reduce__(self):
        return os.system, (f"touch {self.sign}",)


@pytest.mark.parametrize("setting", ["resume", "init_from"])
def test_a_malicious_checkpoint_is_refused_and_nothing_of_it_runs(setting, run, train_tiny, tmp_path):
    sign, file = tmp_path / "harm", tmp_path / "sent.ckpt"
    torch.save({**load_verified(run / "checkpoints" / "last.ckpt"), "state_dict": Harm(sign)}, file)
    with pytest.raises(UsageError, match=r"sent.ckpt is refused: it asks to run (posix|nt).system"):
        train_tiny(tmp_path / "other", f"{setting}={file}")
    assert not sign.exists()
    torch.load(file, weights_only=False)  # it would have
    assert sign.exists()


def test_a_malicious_checkpoint_in_the_runs_folder_is_passed_over(run, finished, train_tiny, tmp_path):
    sign, file = tmp_path / "harm", run / "checkpoints" / "last.ckpt"
    torch.save({**load_verified(file), "callbacks": Harm(sign)}, file)
    results = train_tiny(run, "resume=auto", "checkpoint_every_steps=3")
    assert "posix.system" in results["findings"][0] or "nt.system" in results["findings"][0]
    assert not sign.exists()
    assert_as_if_nothing_had_been(run, finished)


def test_targets_in_a_checkpoint_are_never_made(run, finished, train_tiny, tmp_path):
    sign, file = tmp_path / "harm", run / "checkpoints" / "last-1.ckpt"
    harm = {"_target_": "os.system", "command": f"touch {sign}"}
    sent = {**load_verified(file), "hyper_parameters": {"method": harm, **harm}, "hparams_name": "kwargs"}
    sent["datamodule_hyper_parameters"] = harm
    torch.save(sent, tmp_path / "sent.ckpt")
    train_tiny(tmp_path / "other", f"resume={tmp_path / 'sent.ckpt'}", "checkpoint_every_steps=3")
    state = weights(tmp_path / "other")
    assert all(torch.equal(value, state[name]) for name, value in weights(finished).items())
    record = sent["sslvision"]
    sent["sslvision"] = {**record, "settings": {**record["settings"], "method": harm}}
    torch.save(sent, tmp_path / "sent.ckpt")
    with pytest.raises(UsageError, match=r"method._target_: os.system then, sslvision.methods.mae.MAE now"):
        train_tiny(tmp_path / "third", f"resume={tmp_path / 'sent.ckpt'}")
    assert not sign.exists()


# Row 11, as far as checkpoints go.


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["state_dict", "optimizer_states"])
def test_poisoned_state_is_never_saved_as_good(where, poison, tmp_path):
    file, good = tmp_path / "last.ckpt", AtomicCheckpoints()
    good.save_checkpoint(state(1), file)
    poisoned = state(2) | {"optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(5)}}, "param_groups": []}]}
    tensor = poisoned["state_dict"]["weight"] if where == "state_dict" else poisoned[where][0]["state"][0]["exp_avg"]
    tensor[3] = poison
    with pytest.raises(Diverged, match=rf"{where}.* not finite at update 2.*not saved.*last.ckpt is from update 1"):
        good.save_checkpoint(poisoned, file)
    assert steps(tmp_path) == {"last.ckpt": 1}
    assert names(tmp_path) == ["last.ckpt"]
