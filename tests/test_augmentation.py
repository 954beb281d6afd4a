"""The batched augmentation against torchvision's own transforms, image by image."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomAffine, RandomCrop, v2
from torchvision.transforms import functional as tv

from aerl.data import augment, mix


def pictures(count: int, channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_by_one(images: Tensor, seed: int, hflip: float, vflip: float, translate: float) -> Tensor:
    """What torchvision does to each image, given the draws that `augment` makes from this seed."""
    height, width = images.shape[2:]
    draws = torch.rand(4, len(images), 1, generator=seeded(seed))[..., 0].tolist()
    changed = []
    for image, down, up_down, right, left_right in zip(images, draws[1], draws[0], draws[3], draws[2], strict=True):
        image = tv.vflip(image) if up_down < vflip else image
        image = tv.hflip(image) if left_right < hflip else image
        shift = [round((2 * right - 1) * translate * width), round((2 * down - 1) * translate * height)]
        changed.append(tv.affine(image, angle=0.0, translate=shift, scale=1.0, shear=[0.0, 0.0], fill=[0.0]))
    return torch.stack(changed)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 17, 24), (2, 5, 1)])
@pytest.mark.parametrize("settings", [(0.5, 0.5, 0.1), (0.5, 0.0, 0.0), (0.0, 0.0, 0.4), (1.0, 1.0, 1.0)])
def test_equals_torchvision_for_the_same_draws(
    shape: tuple[int, int, int], settings: tuple[float, float, float]
) -> None:
    images = pictures(64, *shape)
    hflip, vflip, translate = settings
    changed = augment(images, seeded(7), hflip=hflip, vflip=vflip, translate=translate)
    assert changed.dtype == torch.uint8
    assert torch.equal(changed, one_by_one(images, 7, hflip, vflip, translate))


def test_shifts_are_distributed_as_torchvision_draws_them() -> None:
    images = torch.zeros(4000, 1, 32, 20, dtype=torch.uint8)
    images[:, :, 16, 10] = 255  # one white pixel, which shows where its image has gone
    moved = augment(images, seeded(0), hflip=0, vflip=0, translate=0.1)
    _, _, rows, columns = moved.nonzero(as_tuple=True)
    torch.manual_seed(0)
    drawn = [RandomAffine.get_params([0.0, 0.0], [0.1, 0.1], None, None, [20, 32])[1] for _ in range(len(images))]
    for ours, theirs in ((columns - 10, [x for x, _ in drawn]), (rows - 16, [y for _, y in drawn])):
        assert sorted(set(ours.tolist())) == sorted(set(theirs))
        for shift in set(theirs):
            difference = (ours == shift).float().mean() - theirs.count(shift) / len(theirs)
            assert abs(difference) < 0.04  # four standard deviations
    assert abs(torch.corrcoef(torch.stack([rows, columns]).float())[0, 1]) < 0.07  # drawn independently


def test_crops_are_the_cuts_from_a_padded_image_and_all_of_them_equally_often() -> None:
    images = pictures(2000, 1, 8, 6)
    padded = torch.nn.functional.pad(images, [2, 2, 2, 2])
    cuts = torch.stack([padded[:, :, i : i + 8, j : j + 6] for i in range(5) for j in range(5)])
    which = (cuts == augment(images, seeded(0), crop=2)).all(dim=(2, 3, 4))
    assert (which.sum(0) == 1).all() and which.sum(1).max() < 2 * which.sum(1).min()  # 80 each, within four deviations
    torch.manual_seed(0)
    theirs = {tuple(RandomCrop.get_params(padded[0], (8, 6))[:2]) for _ in range(500)}
    assert len(theirs) == len(cuts)


def test_cutout_is_a_square_around_any_pixel_cut_off_at_the_border() -> None:
    cut = augment(torch.full((3000, 2, 9, 7), 255, dtype=torch.uint8), seeded(0), cutout=4) == 0
    assert torch.equal(cut[:, 0], cut[:, 1])
    rows, columns = cut[:, 0].any(2), cut[:, 0].any(1)
    assert torch.equal(cut[:, 0], rows[:, :, None] & columns[:, None, :])  # a rectangle
    seen = {(int(a), int(b)) for a, b in zip(rows.int().argmax(1), rows.sum(1), strict=True)}
    # Centre c covers rows c - 2 to c + 1, those of them that there are.
    assert seen == {(max(0, c - 2), min(9, c + 2) - max(0, c - 2)) for c in range(9)}
    assert columns.sum(1).min() == 2 and columns.sum(1).max() == 4


def test_randaugment_is_torchvisions_with_its_own_operations_for_each_eighth() -> None:
    images = pictures(32)
    torch.manual_seed(3)
    changed = augment(images, seeded(0), randaugment=2, magnitude=15)
    torch.manual_seed(3)
    transform = v2.RandAugment(2, 15)
    assert torch.equal(changed, torch.cat([transform(part) for part in images.split(4)]))
    assert not torch.equal(changed, images)


@pytest.mark.parametrize("settings", [{"cutmix": 1.0}, {"mixup": 0.4}, {"cutmix": 1.0, "mixup": 1.0}])
def test_mixed_images_carry_the_labels_of_both_by_their_share(settings) -> None:
    x = torch.arange(6.0).div(5)[:, None, None, None].expand(6, 1, 8, 8).contiguous()  # the label is in every pixel
    y, kinds = torch.arange(6), set()
    torch.manual_seed(0)
    for _ in range(20):
        mixed, shares = mix(x, y, 6, **settings)
        torch.testing.assert_close(shares.sum(1), torch.ones(6))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ torch.arange(6.0).div(5))
        kinds.add("cutmix" if set(mixed.unique().tolist()) <= set(x.unique().tolist()) else "mixup")
    assert kinds >= settings.keys()


def test_nothing_to_do_gives_back_the_very_images_and_draws_nothing() -> None:
    images, generator = pictures(4), seeded(5)
    before = generator.get_state()
    assert augment(images, generator, hflip=0, vflip=0, translate=0) is images
    assert torch.equal(generator.get_state(), before)


def test_the_memory_format_does_not_matter_and_the_seed_does() -> None:
    images = pictures(16)
    settings = {"hflip": 0.5, "vflip": 0.5, "translate": 0.1}
    changed = augment(images, seeded(2), **settings)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(channels_last, seeded(2), **settings), changed)
    assert torch.equal(augment(images, seeded(2), **settings), changed)
    assert not torch.equal(augment(images, seeded(3), **settings), changed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_every_image_is_one_of_its_own_changes() -> None:
    images = pictures(64)
    generator = torch.Generator("cuda").manual_seed(0)
    changed = augment(images.cuda(), generator, hflip=0.5, vflip=0.5, translate=0).cpu()
    for before, after in zip(images, changed, strict=True):
        flips = (before, before.flip(1), before.flip(2), before.flip(1, 2))
        assert any(torch.equal(after, flipped) for flipped in flips)
