import math

import pytest

from sslvision.methods.dino_collapse import name_collapse

LN_K = math.log(1024)


@pytest.mark.parametrize(
    ("entropy", "information", "settled", "name"),
    [
        (0.001, 0.0005, False, "Single-prototype collapse"),
        (0.5 * LN_K, 0.02, True, "Single-prototype collapse"),  # a few prototypes, the same for all images
        (0.99 * LN_K, 0.001, True, "Uniform collapse"),
        (0.99 * LN_K, 0.001, False, None),  # where a network begins
        (0.99 * LN_K, 0.5, True, None),  # soft answers that differ
        (0.001, 3.0, True, None),  # sharp answers that differ
    ],
)
def test_answers_that_tell_nothing_about_their_image_are_a_collapse_named_by_their_entropy(
    entropy, information, settled, name
):
    found = name_collapse(entropy=entropy, information=information, prototypes=1024, settled=settled)
    assert list(found) == ([name] if name else [])


def test_the_words_say_what_was_measured_and_which_settings_to_change():
    (words,) = name_collapse(entropy=6.9, information=0.01, prototypes=1024, settled=True).values()
    assert "6.9 nats of ln 1024 = 6.93" in words
    for setting in ("teacher_temp", "student_temp", "momentum", "learning rate"):
        assert setting in words
    (words,) = name_collapse(entropy=0.0, information=0.01, prototypes=1024, settled=True).values()
    assert "1 of 1,024 prototypes" in words
    for setting in ("center_momentum=0.9", "teacher_temp", "freeze_prototypes_epochs"):
        assert setting in words
