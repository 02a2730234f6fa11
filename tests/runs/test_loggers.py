"""Loggers: Weights & Biases when it can be reached, and the run's folder when not."""

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sslvision.errors import UsageError
from sslvision.runs.loggers import build_loggers, wandb_problem


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """Nobody: no key in the environment nor in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(nobody, monkeypatch):
    """A server that welcomes one key: server() -> the Authorization headers it was asked with."""
    asked = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"]))
            welcome = self.headers["Authorization"] == "Basic YXBpOnJpZ2h0LWtleQ=="  # api:right-key
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": {"viewer": {"id": "me"} if welcome else None}}).encode())

        def log_message(self, *_):
            pass

    serving = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{serving.server_port}")
    yield asked
    serving.shutdown()
    serving.server_close()


def test_without_a_key_nobody_is_asked(server):
    assert "no key" in wandb_problem()
    assert not server


def test_a_key_that_the_server_knows_is_no_problem(server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "right-key")
    assert wandb_problem() == ""


def test_a_key_from_the_netrc_is_as_good(server, tmp_path):
    host = os.environ["WANDB_BASE_URL"].removeprefix("http://")
    (tmp_path / ".netrc").write_text(f"machine {host} login user password right-key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_problem() == ""


def test_a_key_that_the_server_rejects_is_told_without_the_key(server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "wrong-key")
    assert "rejects the key" in wandb_problem()
    assert "wrong-key" not in wandb_problem()


def test_what_the_person_said_of_the_mode_is_not_asked_about(server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "right-key")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_problem() == "WANDB_MODE=offline"
    assert not server


def test_a_closed_port_is_told_at_once(nobody, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "right-key")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "cannot be reached" in wandb_problem()


def test_a_server_that_never_answers_costs_seconds_whatever_holds_it_up(nobody, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "right-key")
    monkeypatch.setattr("sslvision.runs.loggers.PATIENCE", 0.2)
    monkeypatch.setattr("sslvision.runs.loggers.urlopen", lambda *_, **__: time.sleep(3))  # a name server, say
    started = time.perf_counter()
    assert "does not answer" in wandb_problem()
    assert time.perf_counter() - started < 1


def test_a_logger_whose_package_is_missing_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install"):
        build_loggers("tensorboard", tmp_path, {})
