"""Time as a method sees it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Time in optimizer updates.

    It is passed to every hook that needs it, so methods run and are tested without a Trainer.

    Attributes:
        step: Number of updates done.
        steps: Number of updates in the whole run.
        steps_per_epoch: Number of updates in one pass over the data.
    """

    step: int
    steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> float:
        """Return the passes over the data so far, with fractions."""
        return self.step / self.steps_per_epoch

    @property
    def epochs(self) -> float:
        """Return the passes over the data in the whole run."""
        return self.steps / self.steps_per_epoch
