from pathlib import Path

import pytest

from sslvision.data import order
from sslvision.errors import UsageError
from sslvision.runs.resume import Resume, check_same


def test_a_run_of_an_earlier_version_on_many_images_is_told_that_an_epoch_goes_on_in_another_order():
    def findings(**record):
        return Resume(Path("epoch=1.ckpt"), 5, record, {}).findings

    (found,) = findings(images=70_000)
    assert "epoch=1.ckpt is of an earlier version" in found
    assert findings(images=order.SORTED) == []  # these have the order that they had
    assert findings(images=70_000, order=order.VERSION) == []


def test_a_fine_tuning_of_an_earlier_version_goes_on_without_the_warm_up_it_did_not_have():
    resume = Resume(Path("last.ckpt"), 5, {"settings": {"scratch": True}}, {})
    with pytest.raises(UsageError, match=r"scratch_warmup: 0.0 then, 0.1 now"):
        check_same(resume, {"settings": {"scratch": True, "scratch_warmup": 0.1}})
    check_same(resume, {"settings": {"scratch": True, "scratch_warmup": 0.0}})
    check_same(resume, {"settings": {"scratch": True}})  # what has no such setting at all
