from pathlib import Path

from sslvision.data import order
from sslvision.runs.resume import Resume


def test_a_run_of_an_earlier_version_on_many_images_is_told_that_an_epoch_goes_on_in_another_order():
    def findings(**record):
        return Resume(Path("epoch=1.ckpt"), 5, record, {}).findings

    (found,) = findings(images=70_000)
    assert "epoch=1.ckpt is of an earlier version" in found
    assert findings(images=order.SORTED) == []  # these have the order that they had
    assert findings(images=70_000, order=order.VERSION) == []
