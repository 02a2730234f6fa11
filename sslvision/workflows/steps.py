"""What each of the seven steps does, and what is kept of it; see seven_steps.py for their order."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sslvision.evaluation.step_verdicts import (
    Tried,
    Verdict,
    initial_loss,
    judge_grid,
    judge_rates,
    last_loss,
    overfit,
    regularized,
    regularizers_of,
)
from sslvision.figures.rates import rate_figure
from sslvision.workflows import trainings_record
from sslvision.workflows.ladder import Times
from sslvision.workflows.search_space import with_setting
from sslvision.workflows.step_choices import (
    EXPONENTS,
    grid_length,
    next_exponent,
    rate_name,
    with_decay,
)
from sslvision.workflows.step_trainings import constant, kind_of, plain, start_of, train_for
from sslvision.workflows.trial_training import Finetuning, Pretraining
from sslvision.workflows.tuning_settings import Tune, TuneFinetune

RECORD = "steps.jsonl"
HEART = 200  # updates in which a handful is learned
SWEPT = 100  # updates of a run of the sweep of rates
SWEPT_ON = 2_000  # images of each kind at most that DINO's runs of the sweep are scored on
FEWEST_RATES = 3, 5  # of the sweep, when the budget is over, and when the sweep's share of it is


class Steps:
    """The steps, done and to do."""

    def __init__(
        self,
        settings: Tune | TuneFinetune,
        bench: Pretraining | Finetuning,
        done: Sequence[dict[str, Any]],
        folder: Path,
        console: Console,
        deadline: float | None,
    ):
        self.settings, self.bench, self.folder, self.console, self.deadline = settings, bench, folder, console, deadline
        self.done = [*done]
        self.kind = kind_of(bench, settings)
        self.rate_name = rate_name(settings)
        self.own_rate: float = self._own_rate()
        self.times: Times | None = None

    def _own_rate(self) -> float:
        value = getattr(self.settings, self.rate_name)
        assert value is not None
        return float(value)

    # What is done and recorded.

    def step(self, name: str, judge: Callable[[], Verdict]) -> Verdict:
        """Return the verdict of a step that passed before, or of one that is done now and recorded; print it."""
        for entry in self.done:
            found = entry.get("verdict", {})
            if found.get("step") == name and found["passed"] and not found["numbers"].get("missing"):
                verdict, before = Verdict(**found), " (done before)"
                break
        else:
            verdict, before = judge(), ""
            self.record({"verdict": verdict.record})
        mark = "[green]passed[/]" if verdict.passed else "[bold red]failed[/]"
        self.console.print(f"[bold]{name}[/]: {mark}{before}")
        self.console.print(f"  {verdict.words}", markup=False)
        if verdict.advice:
            self.console.print(f"  {verdict.advice}", markup=False, style="yellow")
        return verdict

    def record(self, entry: dict[str, Any]) -> None:
        """Write down what was done, at once."""
        trainings_record.append(self.folder / RECORD, entry)
        self.done.append(entry)

    def left(self) -> float:
        """Return the seconds that are left."""
        return math.inf if self.deadline is None else self.deadline - time.perf_counter()

    # The steps.

    def first_loss(self) -> Verdict:
        """Do step 1."""
        settings = plain(self.settings)
        curve = train_for(self.bench, settings, updates=1, folder=self.folder / "steps" / "1")
        if self.kind == "other":
            return Verdict(
                "initial loss",
                True,
                f"The loss before the first update is {curve.raw_loss:.4g}; there is no theory of it.",
            )
        return initial_loss(start_of(self.bench, settings, curve))

    def handful(self) -> list[Verdict]:
        """Do step 2: without regularization, and if that succeeds, with the recipe's."""
        learned: list[float] = []

        def run(settings: Any, name: str) -> Any:
            curve = train_for(
                self.bench,
                constant(self.bench_rate(settings), settings),
                updates=HEART,
                folder=self.folder / "steps" / name,
                handful=True,
            )
            losses = curve.losses or [math.nan]
            fell = 1 - last_loss(losses) / losses[0] if losses[0] else 0.0
            learned.append(curve.accuracy / 100 if curve.accuracy is not None else max(0.0, fell))
            return curve

        def without() -> Verdict:
            for factor in (1.0, 0.1, 10.0):  # the rate is the matter of the next step
                curve = run(with_setting(plain(self.settings), self.rate_name, factor * self.own_rate), "2")
                kind = "mae" if self.kind == "other" else self.kind
                found = overfit(kind, curve.losses, accuracy=curve.accuracy, images=16)
                if found.passed:
                    break
            told = "" if factor == 1.0 or not found.passed else f" (At {factor:g} times the recipe's rate.)"
            numbers = {**found.numbers, "factor": factor, "learned": learned[-1]}
            return dataclasses.replace(found, words=found.words + told, numbers=numbers)

        verdict = self.step("overfit a handful", without)
        strong = regularizers_of(self.settings.method, self.settings.backbone)
        if not verdict.passed or not strong or self.kind == "dino":
            return [verdict]

        def own() -> Verdict:
            rate = verdict.numbers.get("factor", 1.0) * self.own_rate
            run(with_setting(self.settings, self.rate_name, rate), "2-regularized")
            return regularized(self.kind, verdict.numbers.get("learned", 1.0), learned[-1], strong)

        return [verdict, self.step("overfit, regularized", own)]

    def rate(self) -> Verdict:
        """Do step 3: sweep the rate, and draw what was learned."""
        settings, tried, base = plain(self.settings, augment=True), list[Tried](), 0.0
        if self.kind == "dino":  # its loss is measured against itself
            settings = dataclasses.replace(settings, evaluate_images=min(settings.evaluate_images, SWEPT_ON))
            base = self.bench.score(self.bench.ground.build(settings), at_most=settings.evaluate_images)[0]  # type: ignore[union-attr]
        until = self._until(0.25)
        for number in range(len(EXPONENTS)):
            over = self.left() <= 0 and number >= FEWEST_RATES[0]
            if over or (until is not None and number >= FEWEST_RATES[1] and time.perf_counter() > until):
                break
            factor = 10 ** next_exponent({math.log10(one.rate / self.own_rate): one.gain for one in tried})
            value = float(f"{factor * self.own_rate:.3g}")
            changed = with_setting(settings, self.rate_name, value)
            curve = train_for(
                self.bench,
                constant(self.bench_rate(changed), changed),
                updates=SWEPT,
                folder=self.folder / "steps" / f"3-{value:g}",
                scored=self.kind == "dino",
            )
            tried.append(Tried(value, self._gain(curve, base)))
        tried.sort(key=lambda one: one.rate)
        verdict, best = judge_rates(tried, own=self.own_rate, name=self.rate_name)
        rate_figure(
            [one.rate for one in tried],
            [one.gain for one in tried],
            own=self.own_rate,
            best=best,
            name=self.rate_name,
            gained=f"rise of {self.bench.objective}" if self.kind == "dino" else "fall of the loss, as a share",
            title=f"{self.folder.name}: {SWEPT} updates at each rate",
        ).savefig(self.folder / "figures" / "rates.png")
        return verdict

    def _gain(self, curve: Any, base: float) -> float:
        if curve.diverged or not curve.losses or not math.isfinite(curve.losses[-1]):
            return math.nan
        if self.kind == "dino":
            return curve.score - base if curve.score is not None else math.nan
        return 1 - last_loss(curve.losses) / curve.losses[0]

    def bench_rate(self, settings: Any) -> float:
        """Return the peak rate of settings."""
        return self.bench.plan(settings).lr if isinstance(self.bench, Finetuning) else float(settings.peak_lr)

    def _until(self, share: float) -> float | None:
        """Return the time at which a share of what is left is over."""
        return None if self.deadline is None else time.perf_counter() + share * self.left()

    # Grids.

    def of_cell(self, cell: Mapping[str, Any]) -> Any:
        """Return the settings with the rate and the weight decay of a cell of a grid."""
        return with_decay(with_setting(self.settings, self.rate_name, cell["rate"]), cell["weight_decay"], self.kind)

    def cell(self, grid: str, rate: float, decay: float, length: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the record of a cell, after training it if it is not done; None if its time is over."""
        key = {"grid": grid, "rate": rate, "weight_decay": decay}
        for entry in self.done:
            if entry.get("grid") and {name: entry[name] for name in key} == key and entry["outcome"] != "cut":
                return entry
        if self.left() <= 0:
            return None
        settings = with_decay(with_setting(self.settings, self.rate_name, rate), decay, self.kind)
        settings = constant(self.bench_rate(settings), settings, warm=True)
        if length.get("images"):
            settings = dataclasses.replace(settings, evaluate_images=length["images"])
        folder = self.folder / "steps" / f"{grid}-{rate:g}-{decay:g}"
        began = time.perf_counter()
        rest = self.times.rest if self.times else 0.0
        found = self.bench.train(
            settings, share=length["share"], folder=folder, deadline=self.deadline, rest=rest, judge=None
        )
        entry = {
            **key,
            "score": found.score,
            "outcome": found.outcome,
            "sigma": found.facts.get("standard_error"),
            "updates": found.facts.get("updates"),
            "metrics": str(folder / "metrics.csv"),
            "seconds": round(time.perf_counter() - began, 1),
        }
        self.record(entry)
        scored = "no score" if found.score is None else f"{self.bench.objective} {found.score:.1f}{self.bench.unit}"
        self.console.print(
            f"  {self.rate_name}={rate:.3g}, weight_decay={decay:g}: {scored}, {found.outcome}, {entry['seconds']:.0f} s",
            markup=False,
        )
        return None if found.outcome == "cut" else entry

    def length(self, cells: int, shares: Sequence[float], epochs: float, least: float) -> dict[str, Any]:
        """Return how many of some cells are trained in a share of the time that is left, and how long; see grid_length."""
        full, most = self.bench.full_updates(self.settings), min(1.0, epochs / self.bench.epochs(self.settings))
        if self.deadline is None:
            return {"cells": cells, "share": most, "images": None}
        if self.times is None:
            self.times = self.bench.measure(self.settings, seconds=min(5.0, 0.02 * self.left()))
        seconds, scored = [share * self.left() for share in shares], None
        if isinstance(self.bench, Pretraining):
            scored = min(self.bench.settings.evaluate_images, self.bench.images)
        return grid_length(cells, seconds, self.times, least=min(least, most), most=most, full=full, scored=scored)

    def grid(
        self, name: str, cells: Sequence[tuple[float, float]], shares: Sequence[float], epochs: float, least: float
    ) -> Verdict:
        """Train a grid, in its order, as far as the time goes, and judge it.

        Args:
            name: Its name.
            cells: Rates and weight decays.
            shares: Of the time that is left; see grid_length.
            epochs: Length of a cell at most, in passes over the images.
            least: Length of a cell at least, as a share of the recipe's, if there are more than a few.
        """
        length = next((one for one in self.done if one.get("length") == name), None)
        if length is None:
            length = {"length": name, **self.length(len(cells), shares, epochs, least)}
            self.record(length)
        planned = length.get("cells", len(cells))
        fewer = f" Time sufficed for {planned} of {len(cells)} cells." if planned < len(cells) else ""
        cells = cells[:planned]
        trained = []
        for rate, decay in cells:
            if (entry := self.cell(name, rate, decay, length)) is None:
                break
            trained.append(entry)
        sigma = next((one["sigma"] for one in trained if one["sigma"]), None)
        verdict = judge_grid(
            [{key: one[key] for key in ("rate", "weight_decay", "score", "metrics", "updates")} for one in trained],
            own_decay=float(self.settings.method.get("weight_decay", 0.05)),
            objective=self.bench.objective,
            unit=self.bench.unit,
            chance=self.chance(),
            sigma=sigma,
        )
        missing = len(cells) - len(trained)
        told = fewer + (
            f" The time was over before {missing} of {len(cells)} cells: a later call trains them." if missing else ""
        )
        numbers = {**verdict.numbers, "missing": missing}
        return dataclasses.replace(verdict, step=name, words=verdict.words + told, numbers=numbers)

    def chance(self) -> float | None:
        """Return the objective of knowing nothing, in percent; None of RankMe."""
        if isinstance(self.bench, Finetuning):
            return 100 / len(self.bench.labeled.classes)
        labels = self.bench.ground.evaluated.train.labels if self.bench.scores == "knn" else None
        return None if labels is None else 100 / (int(labels.max()) + 1)
