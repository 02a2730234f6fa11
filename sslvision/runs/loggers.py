"""Where metrics go: a CSV file always, TensorBoard or Weights & Biases beside it.

A run does not depend on W&B. Without a key, a network or the server's welcome it logs into its folder, and a line says why
and how to send it later.
"""

import base64
import importlib.util
import json
import logging
import netrc
import os
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment

from sslvision.errors import UsageError
from sslvision.runs.metrics import MetricsCSV
from sslvision.runs.redaction import redact

PATIENCE = 5.0  # seconds to wait for the server's first answer
PATIENCE_AT_THE_START = 20.0  # seconds to wait until W&B has made the run
PATIENCE_AT_THE_END = 120.0  # seconds to wait until everything is sent; what is not stays in the run's folder

log = logging.getLogger(__name__)


def build_loggers(kind: str, folder: Path, config: dict[str, Any]) -> list[Logger]:
    """Return the CSV writer, and W&B or TensorBoard beside it. Secrets in `config` are not handed on.

    Raises:
        UsageError: the package for the logger is not installed.
    """
    loggers: list[Logger] = [MetricsCSV(folder)]
    if kind == "tensorboard":
        if importlib.util.find_spec("tensorboard") is None:
            raise UsageError('logger=tensorboard needs the package tensorboard: pip install -e ".[tensorboard]".')
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(save_dir=folder, name="tensorboard", version=""))
    if kind == "wandb":
        loggers.append(WandB(folder, config))
    return loggers


def close_loggers(loggers: list[Logger], folder: Path) -> str:
    """End the logging of a run, so that the next one of a sweep begins its own; return what is left for a person to do."""
    left = ""
    for logger in loggers:
        if isinstance(logger, WandB):
            logger.experiment.finish()
            if logger.why_offline and os.environ.get("WANDB_MODE") != "disabled":
                left = f"W&B was offline: {logger.why_offline}. This sends the run: {logger.sync}"
    return left


class WandB(WandbLogger):
    """Weights & Biases, online if that is possible when the first process begins to log.

    Args:
        folder: of the run.
        config: all its settings.
    """

    why_offline = ""  # empty: it is online

    def __init__(self, folder: Path, config: dict[str, Any]):
        import wandb  # takes a second, and is needed by few

        settings = wandb.Settings(
            # What W&B would collect by itself (the difference to the last commit, the terminal) may hold secrets.
            disable_code=True,
            disable_git=True,
            console="off",
            init_timeout=PATIENCE_AT_THE_START,
            finish_timeout=PATIENCE_AT_THE_END,
        )
        super().__init__(
            name=folder.name, project="sslvision", save_dir=folder, config=redact(config), settings=settings
        )
        self.sync = f"wandb sync {folder}/wandb/offline-run-*"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the W&B run; the first call starts it."""
        if self._experiment is not None:
            return self._experiment
        self._choose_mode(wandb_problem())
        words, sys.argv = sys.argv, redact(sys.argv)  # W&B keeps the command line
        try:
            return super().experiment
        except Exception as error:  # of the network, the server or its client: none of them is worth the run
            if self.why_offline:
                raise
            self._choose_mode(f"it did not start ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
            return super().experiment
        finally:
            sys.argv = words

    def _choose_mode(self, why_offline: str) -> None:
        self.why_offline, said = why_offline, os.environ.get("WANDB_MODE", "online")
        self._wandb_init["mode"] = "offline" if why_offline and said != "disabled" else said
        if self._wandb_init["mode"] == "offline":
            log.warning("W&B is offline: %s. The run goes on; later this sends it: %s", redact(why_offline), self.sync)


def wandb_problem() -> str:
    """Return why Weights & Biases cannot be reached as somebody; empty if it can. Takes a few seconds at most."""
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "disabled", "dryrun"):
        return f"WANDB_MODE={mode}"
    server = _server()
    key = _key(server)
    if not key and "WANDB_IDENTITY_TOKEN_FILE" not in os.environ:
        return "there is no key (wandb login, or the variable WANDB_API_KEY)"
    answers: list[str] = []
    # In a thread: a broken name server is waited for without regard to any time limit.
    asking = threading.Thread(target=lambda: answers.append(_ask(server, key)), daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return answers[0] if answers else f"{server} does not answer within {PATIENCE:g} seconds"


def _server() -> str:
    """Return the address of the environment, of `wandb login --host`, or W&B's own."""
    import wandb

    return str(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).rstrip("/")


def _key(server: str) -> str:
    """Return the key of the environment or the .netrc; empty without any."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return ""
    # W&B's own servers have two names.
    hosts = [urlsplit(server).netloc] + ([] if "WANDB_BASE_URL" in os.environ else ["api.wandb.ai"])
    return next((found[2] for host in hosts if (found := known.authenticators(host))), "")


def _ask(server: str, key: str) -> str:
    """Ask the server whose the key is, through whatever proxy is set; return what is wrong, if anything."""
    request = Request(f"{server}/graphql", json.dumps({"query": "query { viewer { id } }"}).encode())
    request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Authorization", f"Basic {base64.b64encode(f'api:{key}'.encode()).decode()}")
    try:
        with urlopen(request, timeout=PATIENCE) as answer:
            viewer = json.load(answer).get("data", {}).get("viewer")
    except HTTPError as error:  # somebody is there; whatever else it says, W&B's client will handle
        return f"{server} rejects the key" if key and error.code in (401, 403) else ""
    except (URLError, OSError) as error:
        return f"{server} cannot be reached ({getattr(error, 'reason', error)})"
    except Exception:  # an answer of another kind
        return ""
    return "" if viewer or not key else f"{server} rejects the key"
