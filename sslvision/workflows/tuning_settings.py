"""The settings of `tune`: those of pretraining or of fine-tuning, and of the search."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sslvision.errors import UsageError
from sslvision.settings import Finetune, Pretrain, Sections, option, seconds_of
from sslvision.workflows.search_space import parse_space

RANGES = "sslvision.workflows.tuning_settings.any_setting"

_UNSAVED = "without effect: no checkpoints are saved; a trial that was interrupted begins anew"
_AT_THE_END = "without effect: each trial is scored at its end, and on the way if trials are pruned"
_LENGTH = "passes over the images of the recipe that is found, best.yaml; those of a trial are trial_epochs"
_BUDGET = (
    "time for this call, such as 10m or 2h: what is under way when it is over is stopped, and what is done is kept"
)
_NAME = "name of the folder in outputs/ (default: tune, recipe and data)"
_RESUME = "auto, or nothing: trials that are done are kept in any case"
_DRY = "two updates of two trials, then stop"


def any_setting(**ranges: str) -> None:
    """Stand for the keys of `ranges.`: any setting that a search may vary."""


@dataclass
class Search:
    """The settings of a search, whatever it trains."""

    ranges: dict[str, Any] = option(
        {},
        "what is searched, one word each, in quotes: 'ranges.base_lr=log(1e-4,1e-2)' 'ranges.mask_ratio=uniform(0.5,0.9)' "
        "'ranges.backbone.depth=int(2,6)' 'ranges.weight_decay=choice(0,1e-5,1e-4)'",
    )
    search: Literal["random", "grid", "tpe"] | None = option(
        None,
        "how: random, grid (points= values of each range), or tpe (Optuna's, which learns from the trials before); without it, "
        "the seven steps are done",
    )
    steps: Any = option(
        "all",
        "without search=: which of the steps, such as [1,2,3]: 1 initial loss, 2 overfit a handful, 3 rate, 4 coarse grid, 5 "
        "finer grid, 6 learning curves, 7 step 5 again while there is budget",
    )
    trials: int | None = option(
        None, "number of trials, of all processes together (default: 20; of a grid, all of its cells)"
    )
    points: int = option(5, "grid: number of values of a range that has two ends")
    trial_epochs: float | None = option(
        None, "passes over the images of each trial (default: epochs, or fewer, such that all trials fit the budget)"
    )
    pruner: Literal["none", "median", "hyperband"] = option(
        "none",
        "stop trials that do worse than others at a quarter, half and three quarters: median, hyperband (Optuna's)",
    )
    storage: str | None = option(
        None,
        "where the study is kept: any URL of Optuna's (sqlite:///..., postgresql://..., mysql://...), or journal:///path, a "
        "file on a shared disk (default: study.db in the folder); processes with the same storage and study work together",
    )
    study: str | None = option(None, "name of the study in the storage (default: the folder's)")

    def check_search(self) -> None:
        """Check the settings of the search.

        Raises:
            UsageError: One cannot be.
        """
        space = parse_space(self.ranges)
        numbers = self.steps if isinstance(self.steps, list) else [self.steps]
        if self.steps != "all" and (not numbers or not all(type(one) is int and 1 <= one <= 7 for one in numbers)):
            raise UsageError(f"steps={self.steps} must be all, or numbers from 1 to 7, such as steps=[1,2,3].")
        if self.search is None and space:
            raise UsageError("ranges are given, and no search: say search=random, search=grid or search=tpe.")
        if self.search is None and getattr(self, "dry_run", False):
            raise UsageError("The seven steps have no dry run: steps=1 is done in seconds.")
        if self.search is not None and not space:
            raise UsageError(
                f"There is nothing to search: give ranges, such as search={self.search} 'ranges.base_lr=log(1e-4,1e-2)'."
            )
        for key, least in (("trials", 1), ("points", 2)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UsageError(f"{key}={value} is too small: it must be {least} or more.")
        if self.trial_epochs is not None and not 0 < self.trial_epochs < float("inf"):
            raise UsageError(f"trial_epochs={self.trial_epochs} must be a number above 0.")
        if getattr(self, "resume", None) not in (None, "auto"):
            raise UsageError("resume: a search goes on in its own folder, by itself or with resume=auto.")


@dataclass
class Tune(Search, Pretrain):
    """All settings of a search for those of a pretraining run."""

    sections: ClassVar[Sections] = {**Pretrain.sections, "ranges": RANGES}

    epochs: int = option(100, _LENGTH)
    budget: str | None = option(None, _BUDGET)
    max_steps: int | None = option(None, "refused: lengths of trials are trial_epochs, that of the recipe epochs")
    name: str | None = option(None, _NAME)
    resume: str | None = option(None, _RESUME)
    knn_every_epochs: int = option(10, _AT_THE_END)
    knn_every_steps: int | None = option(None, _AT_THE_END)
    checkpoint_every_epochs: int = option(10, _UNSAVED)
    checkpoint_every_steps: int | None = option(2000, _UNSAVED)
    keep_checkpoints: int = option(3, _UNSAVED)
    dry_run: bool = option(False, _DRY)
    plan_gb: float = option(80.0, "without effect: for dry_run=plan of pretrain")
    objective: Literal["auto", "knn", "rankme"] = option(
        "auto",
        "what is best: knn, the k-NN top-1 on held-out labeled images (probe_data= gives some to images without labels); "
        "rankme, the effective rank of the features; auto: knn with labels, else rankme",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_search()
        if self.max_steps is not None:
            raise UsageError(
                f"max_steps={self.max_steps}: give epochs, the length of the recipe that is found, and trial_epochs, that of a "
                "trial (~max_steps removes that of a recipe)."
            )


@dataclass
class TuneFinetune(Search, Finetune):
    """All settings of a search for those of a fine-tuning run, by its validation accuracy."""

    sections: ClassVar[Sections] = {**Finetune.sections, "ranges": RANGES}

    epochs: int = option(20, _LENGTH)
    budget: str | None = option(None, _BUDGET)
    name: str | None = option(None, _NAME)
    resume: str | None = option(None, _RESUME)
    scratch: bool = option(True, "whether the recipe that is found also trains from scratch; trials do not")
    compare: bool = option(False, "refused: a comparison has its own search of rates")
    dry_run: bool = option(False, _DRY)

    @property
    def budget_seconds(self) -> float | None:
        """Return the budget in seconds; None without one."""
        return seconds_of(self.budget)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_search()
        if self.compare:
            raise UsageError(
                "compare=true tunes the rate of each arm itself: use it with python -m sslvision.finetune."
            )
        if self.budget is not None and not self.budget_seconds:
            raise UsageError(f"budget={self.budget} must be a time above 0, such as 90s, 30m, 2h or 3d.")
