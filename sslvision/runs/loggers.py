"""Where metrics go: always a CSV file, and TensorBoard or Weights & Biases as well.

A run does not depend on W&B. Without a key, or if the server cannot be reached or rejects it, W&B logs into the run's folder;
a message says why, and how to upload it later.
"""

import importlib.util
import logging
import netrc
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment

from sslvision.errors import UsageError
from sslvision.runs.metrics import MetricsCSV
from sslvision.runs.redaction import redact

INIT_TIMEOUT = 20.0  # seconds to wait until W&B has created the run
FINISH_TIMEOUT = 120.0  # seconds to wait until everything is uploaded; the rest stays in the run's folder

log = logging.getLogger(__name__)


def build_loggers(kind: str, folder: Path, config: dict[str, Any]) -> list[Logger]:
    """Return the CSV writer, and the W&B or TensorBoard logger. Secrets in `config` are removed.

    Raises:
        UsageError: The package for the logger is not installed.
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
    """Finish logging, so that the next run of a sweep starts its own; return what is left for the user to do."""
    left = ""
    for logger in loggers:
        if isinstance(logger, WandB):
            logger.experiment.finish()
            if logger.why_offline and os.environ.get("WANDB_MODE") != "disabled":
                left = f"W&B was offline: {logger.why_offline}. To upload the run: {logger.sync}"
    return left


class WandB(WandbLogger):
    """Weights & Biases, online if that is possible when the first process starts to log.

    Args:
        folder: Folder of the run.
        config: All settings of the run.
    """

    why_offline = ""  # empty: it is online

    def __init__(self, folder: Path, config: dict[str, Any]):
        import wandb  # slow to import, and rarely needed

        settings = wandb.Settings(
            # What W&B collects by itself (the diff to the last commit, the terminal) may contain secrets.
            disable_code=True,
            disable_git=True,
            console="off",
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
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
        self._choose_mode(wandb_offline_reason())
        arguments, sys.argv = sys.argv, redact(sys.argv)  # W&B stores the command line
        try:
            return super().experiment
        except Exception as error:  # an error of the network, the server or its client must not end the run
            if self.why_offline:
                raise
            reason = " ".join(str(error).split())[:200]
            self._choose_mode(f"it did not start; check the key and the network ({type(error).__name__}: {reason})")
            return super().experiment
        finally:
            sys.argv = arguments

    def _choose_mode(self, why_offline: str) -> None:
        self.why_offline, requested = why_offline, os.environ.get("WANDB_MODE", "online")
        self._wandb_init["mode"] = "offline" if why_offline and requested != "disabled" else requested
        if self._wandb_init["mode"] == "offline":
            log.warning("W&B is offline: %s. The run continues; to upload it later: %s", redact(why_offline), self.sync)


def wandb_offline_reason() -> str:
    """Return why Weights & Biases must not be started online; empty if it may be. Without a key it would ask the user."""
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "disabled", "dryrun"):
        return f"WANDB_MODE={mode}"
    if "WANDB_IDENTITY_TOKEN_FILE" in os.environ or _has_key():
        return ""
    return "there is no key (wandb login, or the variable WANDB_API_KEY)"


def _has_key() -> bool:
    """Return whether the environment or the .netrc has a key for the server."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    server = str(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url)
    # W&B's own servers have two names.
    hosts = [urlsplit(server).netloc] + ([] if "WANDB_BASE_URL" in os.environ else ["api.wandb.ai"])
    return any(known.authenticators(host) for host in hosts)
