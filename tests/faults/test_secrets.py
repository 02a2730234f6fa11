"""Secrets: what is secret in the settings or the environment is in no file that is written (row 27)."""

import sys
from pathlib import Path

import pytest
import yaml

from sslvision.errors import UsageError
from sslvision.runs.redaction import REDACTED, redact

pytestmark = pytest.mark.faults

KEY, TOKEN, PASSWORD = "0123456789abcdef0123456789abcdef01234567", "tok/en+of=mine", "hunter2"

OWN_SOURCE = """
from sslvision.data.sources.embedded import open_embedded


def open_private(*, channels: int = 1, api_key: str = "", url: str = ""):
    assert api_key and url
    return open_embedded(channels=channels)
"""


@pytest.fixture
def private(tmp_path, monkeypatch):
    """Words of a command line that are full of secrets, and an environment that is."""
    (tmp_path / "private_images.py").write_text(OWN_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return [
        *("data._target_=private_images.open_private", f"data.api_key={KEY[:20]}"),
        *(f"data.url=https://me:{PASSWORD}@example.org/images", f"about='made with {TOKEN}'"),
    ]


def files_with(secret, folder):
    return [file for file in Path(folder).rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]


def test_no_file_of_a_run_holds_a_secret(private, run_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain", *private])
    run_tiny(tmp_path / "run", *private, "logger=wandb", "dry_run=true", "evaluate_images=20")
    assert list(tmp_path.rglob("*.wandb")), "W&B wrote its files too"
    assert list(tmp_path.rglob("last.ckpt"))
    (tmp_path / "private_images.py").unlink()
    for secret in (KEY, KEY[:20], TOKEN, PASSWORD):
        assert not files_with(secret, tmp_path), f"{secret} was written down"
    told = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert told["data"]["api_key"] == REDACTED
    assert told["about"] == f"made with {REDACTED}"
    assert told["batch_size"] == 296  # what is no secret is all there


@pytest.mark.e2e
def test_no_file_of_a_sweep_holds_a_secret(warm_command, tmp_path):
    words = (
        "-m",
        "recipe=mae",
        "seed=0,1",
        "batch_size=99999",
        f"about='{TOKEN}'",
        f"reference='https://me:{PASSWORD}@host'",
    )
    ended = warm_command(*words, cwd=tmp_path, HF_TOKEN=TOKEN)
    assert ended.returncode == 3, ended.stderr  # fewer images than a batch, twice
    assert not files_with(TOKEN, tmp_path)
    assert not files_with(PASSWORD, tmp_path)


def test_a_run_whose_files_hold_no_secret_asks_for_it_again(tmp_path, settings_of):
    target = {"_target_": "sslvision.data.sources.folder.open_folder", "root": f"https://{REDACTED}@example.org"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": target}))
    with pytest.raises(UsageError, match=r"data.root is not kept .* give it again, data.root="):
        settings_of("probe", f"run={tmp_path}")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ({"api_key": "abcdefgh", "password": 1234}, {"api_key": REDACTED, "password": REDACTED}),
        ({"tokens": ["abcdefgh", "ijklmnop"]}, {"tokens": [REDACTED, REDACTED]}),
        ({"storage": {"AccountKey": "abcd+efgh=="}}, {"storage": {"AccountKey": REDACTED}}),
        ("data.token=with blanks in it", f"data.token={REDACTED}"),
        ("++data.secret='x y' seed=1", f"++data.secret={REDACTED}"),
        ("https://me:word@example.org/a", f"https://{REDACTED}@example.org/a"),
        ("https://abcdef0123@example.org/a.git", f"https://{REDACTED}@example.org/a.git"),
        ("s3://b/o?X-Amz-Signature=abcd&part=1", f"s3://b/o?X-Amz-Signature={REDACTED}&part=1"),
        ("data.url=https://h/a?access_token=abcdefgh", f"data.url=https://h/a?access_token={REDACTED}"),
        ('{"token": "abcdefgh", "n": 1}', f'{{"token": "{REDACTED}", "n": 1}}'),
        ("Bearer abc.def", f"Bearer {REDACTED}"),
        ("hf_abcdefghijklmnopqrstuvwxyz", REDACTED),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", REDACTED),
    ],
)
def test_a_secret_is_told_by_its_name_or_form(value, written):
    assert redact(value) == written


@pytest.mark.parametrize(
    "value",
    [
        {"pool": "token", "class_token": True, "cls_token": "learned", "num_tokens": 12345678, "token": "avg"},
        {"image_key": "jpg;png;jpeg;webp", "key": "jpg", "label_key": "a_long_word", "api_key": None, "password": ""},
        {"lr": 1e-3, "mean": [0.5], "names": ("a", "b"), "workers": None},
        "backbone.class_token=true pool=token 'name=a b' lr=1e-3",
        "https://example.org:8080/a@b?x=1",
        "git@github.com:me/mine.git",
        "photos of 2021: keys and tokens",
    ],
)
def test_what_is_no_secret_stays(value):
    assert redact(value) == value


@pytest.mark.parametrize("form", ["{}", "at /data/{}/images", "https://host/tok%2Fen%2Bof%3Dmine"])
def test_the_value_of_a_secret_variable_is_redacted_wherever_it_stands(form, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", TOKEN)
    monkeypatch.setenv("SOME_PASSWORD", "a")  # too short to look for
    assert redact({"root": [form.format(TOKEN)]})["root"][0].count(REDACTED) == 1
    assert redact("a path") == "a path"


def test_redaction_leaves_what_it_was_given_alone():
    given = {"data": {"token": "abcdefgh", "sizes": [1, 2]}}
    assert redact(given) == {"data": {"token": REDACTED, "sizes": [1, 2]}}
    assert given["data"]["token"] == "abcdefgh"
