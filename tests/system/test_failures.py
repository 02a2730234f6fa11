"""What an exception of the machine means in words."""

import errno
import os

import pytest

from sslvision.errors import DataError, StorageError
from sslvision.system.failures import explained

LOST = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:45713: Connection reset by peer. This is "
    "typically caused by a remote worker hanging or bugs in the application."
)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_nothing_is_a_storage_error_that_names_the_file_and_the_room_there_is(number, tmp_path):
    file = tmp_path / "not" / "yet" / "there.png"
    found = explained(OSError(number, os.strerror(number), str(file)), None)
    assert isinstance(found, StorageError)
    assert found.exit_code == 5
    assert str(file) in str(found)
    assert os.strerror(number) in str(found)
    assert "bytes free" in str(found)


def test_where_the_exception_names_no_file_the_run_folder_is_named(tmp_path):
    found = explained(OSError(errno.ENOSPC, "No space left on device"), str(tmp_path / "run"))
    assert str(tmp_path / "run") in str(found)


def test_the_cause_of_an_exception_counts(tmp_path):
    error = RuntimeError("PytorchStreamWriter failed writing file")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a.csv"))
    assert isinstance(explained(error, None), StorageError)


def test_other_libraries_say_it_in_words(tmp_path):
    told = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert isinstance(explained(Exception(told), str(tmp_path)), StorageError)


def test_a_folder_that_may_not_be_written_is_a_storage_error_and_a_file_that_may_not_be_read_is_not(
    tmp_path, monkeypatch
):
    file = tmp_path / "photo.png"
    file.touch()
    error = PermissionError(errno.EACCES, "Permission denied", str(file))
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)  # root may do everything
    assert isinstance(explained(error, None), StorageError)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert explained(error, None) is None
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.W_OK)
    assert explained(error, None) is None


@pytest.mark.parametrize(
    "told",
    [
        "DataLoader worker (pid 4711) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 4711, 4712) exited unexpectedly",
        "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared "
        "memory. Please try to raise your shared memory limit.",
        "Caught OSError in DataLoader worker process 0.\nTraceback (most recent call last):\nOSError: [Errno 28] No space left",
    ],
)
def test_a_lost_loader_process_is_told_with_the_setting_that_helps(told):
    found = explained(RuntimeError(told), None)
    assert found.exit_code == 1
    assert "data.workers=" in str(found)
    assert "memory" in str(found)


def test_a_lost_process_of_the_run_is_told():
    found = explained(RuntimeError(LOST), None)
    assert found.exit_code == 1
    assert "Another process of this run has ended" in str(found)


def test_a_process_that_does_not_answer_and_one_that_never_came_are_told_apart():
    hung = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 10000ms for recv operation"
    assert "has not answered within timeout= seconds" in str(explained(RuntimeError(hung), None))
    absent = "Timed out after 31 seconds waiting for clients. 3/4 clients joined."
    assert "3 of 4 processes have come" in str(explained(RuntimeError(absent), None))


def test_what_is_explained_already_stays_and_mistakes_of_ours_are_not_explained_away(tmp_path):
    known = DataError("There are no images.")
    assert explained(known, None) is known
    assert explained(RuntimeError("CUDA out of memory"), None) is None
    assert explained(FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "a")), None) is None
    assert explained(RuntimeError("Caught ValueError in DataLoader worker process 0."), None) is None
