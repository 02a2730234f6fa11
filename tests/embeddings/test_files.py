"""Part files and the vectors made of them."""

import numpy as np
import pytest
import torch
from written_embeddings import write_embeddings

from sslvision.embeddings.parts import (
    Rows,
    as_path,
    as_text,
    is_whole,
    part_file,
    read_embeddings,
    read_part,
    write_part,
)
from sslvision.embeddings.vectors import open_embeddings
from sslvision.errors import DataError, UsageError


@pytest.fixture
def embeddings():
    """250 embeddings (N, D) that share a large part, as those of a network do."""
    return (np.random.default_rng(0).normal(size=(250, 6)) + 20).astype(np.float32)


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_a_part_is_read_as_it_was_written(form, tmp_path):
    file = part_file(tmp_path / "a=b", 3, form)
    rows = Rows(
        ["a.png", "été/b.png"],
        ["train", "test"],
        ["ant", ""],
        ["bee", "bee"],
        np.array([0.5, 1], np.float32),
        np.arange(6, dtype=np.float16).reshape(2, 3),
        [("c.png", "it is empty")],
    )
    write_part(file, rows)
    again = read_part(file)
    for name in ("paths", "splits", "labels", "predictions", "unreadable"):
        assert getattr(again, name) == getattr(rows, name), name
    assert np.array_equal(again.probabilities, rows.probabilities)
    assert np.array_equal(again.embeddings, rows.embeddings)
    assert again.embeddings.dtype == np.float16
    assert np.array_equal(read_embeddings(file), rows.embeddings)


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_an_empty_part_has_the_width_of_the_others(form, tmp_path):
    file = part_file(tmp_path, 0, form)
    write_part(file, Rows([], [], None, None, None, np.empty((0, 3), np.float32), [("a.png", "it is empty")]))
    assert read_part(file).embeddings.shape == (0, 3)
    assert is_whole(file)


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_a_damaged_part_is_told_from_a_whole_one(form, tmp_path, embeddings):
    write_embeddings(tmp_path, embeddings, form=form)
    file = part_file(tmp_path, 1, form)
    assert is_whole(file)
    file.write_bytes(file.read_bytes()[:-100])
    assert not is_whole(file)
    with pytest.raises(DataError, match=r"part-00001\.\w+ cannot be read .*Delete it, and repeat the command"):
        read_part(file)


def test_file_names_that_are_no_text_are_written_as_text_and_found_again():
    name = b"caf\xe9/\xff.png".decode("utf-8", "surrogateescape")
    assert as_text(name) == r"caf\xe9/\xff.png"
    assert as_path(as_text(name)) == name
    assert as_path("été/a.png") == "été/a.png"


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_vectors_are_centered_and_of_length_1_and_other_images_are_made_the_same(form, tmp_path, embeddings):
    opened = open_embeddings(write_embeddings(tmp_path / "a", embeddings, form=form))
    expected = embeddings - embeddings.mean(axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(opened.vectors.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(opened.unit(torch.from_numpy(embeddings[:3])).numpy(), expected[:3], atol=1e-4)
    assert opened.paths[249] == "249.png"
    raw = open_embeddings(tmp_path / "a", center=False)
    np.testing.assert_allclose(
        raw.vectors.numpy(), embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), atol=1e-6
    )


def test_few_embeddings_are_not_centered(tmp_path, embeddings):
    assert not open_embeddings(write_embeddings(tmp_path, embeddings[:99])).mean.any()


def test_equal_embeddings_have_equal_vectors_though_they_are_their_mean(tmp_path):
    opened = open_embeddings(write_embeddings(tmp_path, np.full((120, 4), 3, np.float32)))
    assert torch.allclose(opened.vectors, torch.full((120, 4), 0.5))


def test_vectors_are_written_once_and_again_for_other_embeddings(tmp_path, embeddings):
    write_embeddings(tmp_path, embeddings)
    open_embeddings(tmp_path)
    file = tmp_path / "vectors-centered.npy"
    before = file.stat().st_mtime_ns
    open_embeddings(tmp_path)
    assert file.stat().st_mtime_ns == before
    write_embeddings(tmp_path, embeddings[::-1].copy(), key="def")
    opened = open_embeddings(tmp_path)
    assert torch.allclose(opened.vectors[0], opened.unit(torch.from_numpy(embeddings[-1:]))[0], atol=1e-5)


def test_what_is_no_complete_folder_of_embeddings_is_refused(tmp_path, embeddings):
    with pytest.raises(UsageError, match=r"embeddings=.*nowhere does not exist: make them with sslvision embed"):
        open_embeddings(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has no embeddings"):
        open_embeddings(tmp_path)
    write_embeddings(tmp_path, embeddings)
    part_file(tmp_path, 2, "npz").unlink()
    with pytest.raises(
        UsageError, match=r"1 of 3 files .* missing, the first: part-00002\.npz.*sslvision\.embed run=a"
    ):
        open_embeddings(tmp_path)
    embeddings[3, 3] = np.inf
    write_embeddings(tmp_path, embeddings)
    with pytest.raises(DataError, match=r"part-00000\.npz has values that are not finite"):
        open_embeddings(tmp_path)
