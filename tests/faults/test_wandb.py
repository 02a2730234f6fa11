"""Weights & Biases without an account, a key, a network or a welcome: the run goes on offline and says so (row 26)."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sslvision.runs.loggers import build_loggers, close_loggers

pytestmark = pytest.mark.faults

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server(monkeypatch):
    """A server to which W&B is sent: server(status, viewer) sets its answer to everything."""

    class Answers(BaseHTTPRequestHandler):
        status, viewer = 200, None

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(Answers.status)
            self.end_headers()
            self.wfile.write(json.dumps({"data": {"viewer": Answers.viewer}}).encode())

        def log_message(self, *_):
            pass

    def answer(status, viewer=None):
        Answers.status, Answers.viewer = status, viewer

    serving = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{serving.server_port}")
    yield answer
    serving.shutdown()
    serving.server_close()


def test_a_run_without_a_key_is_logged_in_its_folder_and_told_how_to_send_it(run_tiny, tmp_path, caplog, capsys):
    folder = tmp_path / "run"
    results = run_tiny(folder, "logger=wandb", "dry_run=true", "evaluate_images=20")
    assert results["loss"] > 0
    (written,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    ends = time.monotonic() + 60  # wandb's own process writes it, and on a busy machine it does so after the run's end
    while written.stat().st_size < 1000 and time.monotonic() < ends:
        time.sleep(0.1)
    assert written.stat().st_size > 1000
    said = [record.message for record in caplog.records if "W&B is offline" in record.message]
    assert len(said) == 1, "one line, at the start"
    for text in (said[0], " ".join(capsys.readouterr().out.split())):
        assert "there is no key (wandb login, or the variable WANDB_API_KEY)" in text
        assert f"wandb sync {folder}/wandb/offline-run-*" in text


@pytest.mark.parametrize("status", [401, *(pytest.param(status, marks=pytest.mark.slow) for status in (200, 403))])
@pytest.mark.e2e
def test_a_key_that_is_rejected_costs_seconds_and_no_run(server, tmp_path, monkeypatch, caplog, status):
    server(status)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    left = log_once(tmp_path / "run")
    assert "it did not start; check the key" in left
    assert "wandb sync" in left
    assert KEY not in left + caplog.text


@pytest.fixture
def waits(monkeypatch):
    """How long starting a run may take, two seconds; the list has what W&B is told of it, once for each start."""
    import wandb

    told, init = [], wandb.init

    def start(**options):
        told.append(options["settings"].init_timeout)
        return init(**options)

    monkeypatch.setattr("sslvision.runs.loggers.INIT_TIMEOUT", 2)
    monkeypatch.setattr(wandb, "init", start)
    return told


def test_a_network_that_is_not_there_costs_seconds_and_no_run(waits, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    left = log_once(tmp_path / "run")
    assert "it did not start; check the key and the network" in left
    assert set(waits) == {2}


def test_a_client_that_fails_to_start_goes_offline_as_well(server, tmp_path, monkeypatch):
    import wandb

    server(200, {"id": "me"})
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    init = wandb.init

    def fails_online(mode=None, **options):
        if mode != "offline":
            raise wandb.errors.CommError("the project was deleted")
        return init(mode=mode, **options)

    monkeypatch.setattr(wandb, "init", fails_online)
    left = log_once(tmp_path / "run")
    assert "it did not start; check the key and the network (CommError: the project was deleted)" in left


def test_an_outage_after_the_welcome_is_waited_for_no_longer_than_said(waits, server, tmp_path, monkeypatch):
    server(200, {"id": "me"})
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    left = log_once(tmp_path / "run")
    assert "it did not start" in left
    assert set(waits) == {2}


def test_a_person_who_disabled_wandb_is_not_spoken_to(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    left = log_once(tmp_path / "run")
    assert left == ""
    assert "offline" not in caplog.text
    assert not list((tmp_path / "run").rglob("*.wandb"))


def log_once(folder):
    """Log a number as a run does; return what is left to do. The CSV has the number in any case."""
    folder.mkdir()
    loggers = build_loggers("wandb", folder, {"seed": 0})
    for logger in loggers:
        logger.log_metrics({"loss": 1.5}, step=1)
    left = close_loggers(loggers, folder)
    assert "1.5" in (folder / "metrics.csv").read_text()
    logging.getLogger("wandb").handlers.clear()
    return left
