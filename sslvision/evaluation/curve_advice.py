"""Advice in the terms of a run's own settings: what to type to train longer, at another rate, or with other regularization."""

import re
from collections.abc import Mapping
from typing import Any

# What to add against overfitting, strongest evidence at few labels first, and the value to begin with.
REGULARIZERS = {
    "mixup": 0.8,
    "label_smoothing": 0.1,
    "backbone.drop_path_rate": 0.1,
    "randaugment": 9,
    "cutmix": 1,
}
# What may be too strong, and the value above which it is unusual.
UNUSUAL = {
    "weight_decay": 0.5,
    "backbone.drop_rate": 0.5,
    "backbone.drop_path_rate": 0.5,
    "backbone.proj_drop_rate": 0.5,
    "weight_noise": 0.3,
    "label_smoothing": 0.4,
    "cutout": 0.8,
}
USUAL = {"weight_decay": 0.05, "label_smoothing": 0.1, "cutout": 0.5}  # 0 of the others
MIXED = ("mixup", "cutmix", "erase", "cutout", "randaugment", "weight_noise")


class Given:
    """The settings of a run, and words that change them.

    Args:
        settings: As `dataclasses.asdict` of Pretrain or Finetune; may be empty.
        peak_lr: The highest learning rate of the run, for a run whose settings are not known.
        epochs: Epochs at the end of the run.
    """

    def __init__(self, settings: Mapping[str, Any] | None, *, peak_lr: float | None, epochs: float):
        self.settings, self.peak_lr, self.epochs = settings or {}, peak_lr, epochs

    def get(self, word: str, default: Any = None) -> Any:
        """Return a setting by its word: epochs, mixup (short for method.mixup), backbone.drop_rate."""
        section, _, key = word.rpartition(".")
        if section:
            found = (self.settings.get(section) or {}).get(key)
        else:
            found = self.settings.get(key, (self.settings.get("method") or {}).get(key))
        return default if found is None else found

    @property
    def lr_word(self) -> str:
        """Return the setting that the learning rate of the run comes from."""
        words = [word for word in ("lr", "base_lr", "lr_ratio") if self.get(word) is not None]
        return words[0] if words else "lr"

    def rate(self, factor: float) -> tuple[str, ...]:
        """Return the words for the learning rate times a factor."""
        now = self.get(self.lr_word, self.peak_lr)
        return () if not now else (f"{self.lr_word}={number(factor * now)}",)

    def longer(self, factor: float = 2) -> tuple[str, ...]:
        """Return the words for so many times the updates, by the setting that limits them."""
        if budget := re.fullmatch(r"([\d.]+)([smhd])", str(self.get("budget", ""))):
            return (f"budget={number(factor * float(budget[1]))}{budget[2]}",)
        epochs, least = self.get("epochs", 0), self.get("min_updates", 0)
        if least and self.epochs > 1.02 * epochs:  # a small data set: more epochs than set
            return (f"min_updates={round(factor * least)}",)
        return (f"epochs={round(factor * (epochs or self.epochs)) or 1}",)

    def warmup(self, epochs: float) -> tuple[str, ...]:
        """Return the word for another warm-up."""
        return (f"warmup_epochs={number(epochs)}",)

    def batch(self, factor: float) -> tuple[str, ...]:
        """Return the words for a batch of so many times the images, at the same peak learning rate."""
        now = self.get("batch_size")
        if not now:
            return ()
        same_rate = self.rate(1 / factor) if self.lr_word != "lr" else ()  # the others are per 256 images
        return (f"batch_size={max(1, round(factor * now))}", *same_rate)

    def regularizers(self, most: int = 3) -> tuple[str, ...]:
        """Return words for regularizers that the run did without."""
        return tuple(f"{word}={value:g}" for word, value in REGULARIZERS.items() if not self.get(word))[:most]

    def unusual(self) -> tuple[str, ...]:
        """Return the words, as given, of regularizers that are unusually strong."""
        return tuple(f"{word}={self.get(word):g}" for word, most in UNUSUAL.items() if self.get(word, 0) > most)

    def usual(self) -> tuple[str, ...]:
        """Return words that set the unusually strong ones to a usual value."""
        return tuple(f"{word.partition('=')[0]}={USUAL.get(word.partition('=')[0], 0):g}" for word in self.unusual())

    @property
    def mixes(self) -> bool:
        """Return whether training images are altered so much that training accuracy is not that of validation images."""
        return any(self.get(word) for word in MIXED)


def number(value: float) -> str:
    """Return a number with two significant digits, as one types it."""
    return f"{value:.0f}" if value >= 10 and round(value) == round(value, 6) else f"{float(f'{value:.2g}'):g}"
