"""Loggers: when Weights & Biases is not started online, and packages that are missing."""

import pytest

from sslvision.errors import UsageError
from sslvision.runs.loggers import build_loggers, wandb_offline_reason


@pytest.fixture(autouse=True)
def _no_account(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_key_wandb_stays_offline():
    assert "no key" in wandb_offline_reason()


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_credentials_from_the_environment_suffice(name, monkeypatch):
    monkeypatch.setenv(name, "something")
    assert wandb_offline_reason() == ""


@pytest.mark.parametrize("server", [None, "https://wandb.example.com"])
def test_a_key_from_the_netrc_suffices_for_its_server(server, tmp_path, monkeypatch):
    host = "api.wandb.ai" if server is None else "wandb.example.com"
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    (tmp_path / ".netrc").write_text(f"machine {host} login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_offline_reason() == ""
    monkeypatch.setenv("WANDB_BASE_URL", "https://another.example.com")
    assert "no key" in wandb_offline_reason()


def test_the_mode_that_the_user_set_is_respected(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_offline_reason() == "WANDB_MODE=offline"


def test_a_logger_whose_package_is_missing_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install"):
        build_loggers("tensorboard", tmp_path, {})
