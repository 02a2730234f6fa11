import pytest
import torch

from sslvision.nn.masking import random_keep


@pytest.mark.parametrize(
    ("patches", "mask_ratio", "visible"), [(196, 0.75, 49), (64, 0.75, 16), (49, 0.75, 12), (16, 0.5, 8)]
)
def test_the_mask_keeps_exactly_the_stated_number_in_every_image(patches, mask_ratio, visible):
    keep, hidden = random_keep(torch.rand(5, patches), mask_ratio)
    assert keep.shape == (5, visible)
    both = torch.cat([keep, hidden], dim=1).sort(dim=1).values
    assert (both == torch.arange(patches)).all()


def test_every_image_has_a_mask_of_its_own():
    keep, _ = random_keep(torch.rand(20, 64, generator=torch.Generator().manual_seed(0)), 0.75)
    assert len({tuple(sorted(row)) for row in keep.tolist()}) == 20


def test_the_smallest_noise_is_kept_in_its_order():
    keep, hidden = random_keep(torch.tensor([[0.3, 0.1, 0.9, 0.2]]), 0.5)
    assert keep.tolist() == [[1, 3]]
    assert hidden.tolist() == [[0, 2]]
