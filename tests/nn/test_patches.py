import torch

from sslvision.nn.patches import gather_patches, gather_tokens, scatter_patches


def test_patches_are_taken_from_their_place_on_a_row_major_grid():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    taken = gather_patches(images, torch.tensor([[5, 0], [2, 3]]), 2)
    assert torch.equal(taken[0, 0], images[0, :, 2:4, 4:6])
    assert torch.equal(taken[0, 1], images[0, :, 0:2, 0:2])
    assert torch.equal(taken[1, 0], images[1, :, 0:2, 4:6])
    assert torch.equal(taken[1, 1], images[1, :, 2:4, 0:2])


def test_putting_back_what_was_taken_changes_nothing_and_other_patches_only_their_place():
    images = torch.rand(2, 1, 8, 8)
    index = torch.tensor([[0, 3], [1, 2]])
    assert torch.equal(scatter_patches(images, gather_patches(images, index, 4), index), images)
    changed = scatter_patches(images, torch.zeros(2, 2, 1, 4, 4), index)
    assert changed[0, :, :4, :4].sum() == 0
    assert torch.equal(changed[0, :, :4, 4:], images[0, :, :4, 4:])


def test_tokens_shared_by_a_batch_and_tokens_of_each_image_are_gathered_alike():
    tokens, index = torch.rand(1, 6, 4), torch.tensor([[5, 1], [0, 0], [2, 3]])
    assert torch.equal(gather_tokens(tokens, index), gather_tokens(tokens.repeat(3, 1, 1), index))
    assert torch.equal(gather_tokens(tokens, index)[2, 1], tokens[0, 3])
