"""Ranges of settings: what is read, which values they have, and which settings follow."""

import pytest

from sslvision.errors import UsageError
from sslvision.workflows.search_space import Range, cells_of, draw, grid, parse_range, parse_space, with_values


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("log(1e-4,1e-2)", Range("log", 1e-4, 1e-2)),
        ("uniform(-1, 1)", Range("uniform", -1, 1)),
        ("int(2,6)", Range("int", 2, 6)),
        ("choice(0,1e-5,[0.2,1])", Range("choice", choices=("0", "1e-5", "[0.2,1]"))),
        ([0, 0.05], Range("choice", choices=("0", "0.05"))),
    ],
)
def test_ranges_are_read_as_they_are_written(text, found):
    assert parse_range("x", text) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1e-3", r"ranges\.x=1e-3 is no range: write log\(1e-4,1e-2\)"),
        ("log(0,1)", "a logarithm needs numbers above 0"),
        ("log(1,a)", "needs two numbers"),
        ("uniform(2,1)", "the first number must be below the second"),
        ("int(1,2.5)", "needs whole numbers"),
        ("choice(1,1)", "lists a value twice"),
        ("choice()", "is no range"),
    ],
)
def test_what_is_no_range_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_range("x", text)


def test_a_search_refuses_what_it_cannot_vary_and_two_learning_rates():
    with pytest.raises(UsageError, match=r"ranges\.epochs: a search varies lr, base_lr"):
        parse_space({"epochs": "int(1,5)"})
    with pytest.raises(UsageError, match=r"ranges\.lr and ranges\.base_lr set the same"):
        parse_space({"lr": "log(1e-4,1e-2)", "base_lr": "log(1e-4,1e-2)"})
    assert list(parse_space({"method": {"mask_ratio": "uniform(0.5,0.9)"}})) == ["method.mask_ratio"]


def test_values_lie_in_their_range_and_both_ends_belong_to_it():
    for one in (Range("log", 1e-4, 3e-2), Range("uniform", -1, 0.123456), Range("int", 2, 4)):
        values = [one.at(share / 100) for share in range(101)]
        assert (min(values), max(values)) == (one.low, one.high)
    assert {Range("int", 2, 4).at(share / 100) for share in range(100)} == {2, 3, 4}
    assert Range("log", 1e-4, 1e-2).points(3) == [1e-4, 1e-3, 1e-2]
    assert Range("choice", choices=("a", "b")).at(0.99) == "b"


def test_a_grid_has_every_combination_once_and_draws_repeat_by_their_seed():
    space = {"a": Range("log", 1e-3, 1e-1), "b": Range("choice", choices=("0", "1"))}
    cells = grid(space, points=3, seed=0)
    assert len(cells) == len({tuple(cell.items()) for cell in cells}) == 6
    assert cells_of(space) is None
    assert cells_of({"b": space["b"], "c": Range("int", 1, 3)}) == 6
    first, again, other = (next(draw(space, seed=0, number=number)) for number in (1, 1, 2))
    assert first == again != other


def test_values_become_settings_and_a_rate_is_not_hidden_by_another(settings_of):
    space = parse_space(
        {"base_lr": "log(1e-4,1e-2)", "method.mask_ratio": "choice(0.5,0.6)", "backbone.depth": "int(1,3)"}
    )
    settings = settings_of("pretrain", "recipe=dino")
    assert settings.lr is not None  # DINO's recipe gives it, and it would hide base_lr
    changed = with_values(settings, space, {"base_lr": 2e-3, "method.mask_ratio": "0.6", "backbone.depth": 2})
    assert (changed.peak_lr, changed.method["mask_ratio"], changed.backbone["depth"]) == (2e-3 * 64 / 256, 0.6, 2)
    assert "mask_ratio" not in settings.method
