import torch

from sslvision.augment.randomness import ImageRandom, permutation


def of(index, *, seed=0, epoch=0):
    index = torch.as_tensor(index)
    return ImageRandom(seed, torch.full_like(index, epoch), index)


def test_numbers_are_uniform_and_images_epochs_seeds_and_purposes_are_independent():
    base = of(torch.arange(4000)).uniform("mask", 50)
    assert abs(base.mean() - 0.5) < 3e-3
    assert abs(base.var() - 1 / 12) < 1e-3
    assert base.min() >= 0
    assert base.max() < 1
    others = [
        of(torch.arange(4000), epoch=1).uniform("mask", 50),
        of(torch.arange(4000), seed=1).uniform("mask", 50),
        of(torch.arange(4000)).uniform("crop 0", 50),
        of(torch.arange(1, 4001)).uniform("mask", 50),
        base.roll(1, dims=1),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]) < 0.01


def test_an_images_numbers_do_not_depend_on_the_batch_it_is_in():
    together = of([7, 3, 99]).uniform("mask", 16)
    assert torch.equal(of([99]).uniform("mask", 16)[0], together[2])


def test_the_first_numbers_do_not_depend_on_how_many_are_drawn():
    assert torch.equal(of([5]).uniform("mask", 4), of([5]).uniform("mask", 9)[:, :4])


def test_the_numbers_never_change_from_version_to_version():
    drawn = of([0, 1], seed=3, epoch=2).uniform("mask", 3)
    assert (drawn * (1 << 24)).long().tolist() == [[11728092, 1946, 5422236], [9812556, 2105953, 11322274]]


def test_an_epoch_is_a_permutation_and_epochs_and_seeds_have_their_own():
    one = permutation(1000, seed=0, epoch=0)
    assert torch.equal(one.sort().values, torch.arange(1000))
    for other in (permutation(1000, seed=0, epoch=1), permutation(1000, seed=1, epoch=0)):
        assert (one == other).float().mean() < 0.01
