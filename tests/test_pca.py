import numpy as np
import pytest
import torch

from support.errors import UserError
from support.pca import Moments, PatchColours


def scene(seed: int = 0, size: int = 8, features: int = 12, shift: float = 5.0):
    """Tokens (R, C, D) of an object in the middle, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 0.1 * torch.randn(size, size, features, generator=generator)
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[2 : size - 2, 2 : size - 1] = True
    tokens[mask] += shift * torch.eye(features)[0]
    # Within the object: differences along the features 1, 2 and 3, the largest along 1.
    spread = torch.randn(int(mask.sum()), 3, generator=generator) * torch.tensor([2.0, 1.0, 0.5])
    tokens[mask] += padded(spread, features)
    return tokens, mask


def padded(rows: torch.Tensor, features: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (1, features - 4))


def rotation(features: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(features, features, generator=generator))[0]


def test_components_of_rows_in_parts_are_those_of_all_rows():
    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 3
    moments = Moments()
    for part in rows.split(70):
        moments.add(part)
    found = moments.components(3)
    centred = rows.double().numpy() - rows.double().numpy().mean(axis=0)
    _, lengths, directions = np.linalg.svd(centred, full_matrices=False)
    for i in range(3):
        assert abs(directions[i] @ found.directions[:, i].numpy()) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found.deviations, lengths[:3] / 200**0.5, rtol=1e-6)
    scores = found.scores(rows)
    torch.testing.assert_close(scores.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(scores.square().mean(0), torch.ones(3).double())
    largest = found.directions.gather(0, found.directions.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("shift", [5.0, -5.0])
@pytest.mark.parametrize("turn", range(4))
def test_the_foreground_is_away_from_the_border_whatever_the_sign_of_the_component(shift, turn):
    tokens, mask = scene(shift=shift)
    tokens = tokens @ rotation(12, turn)  # which changes the signs that the eigenvectors come with
    colours = PatchColours(lambda: [tokens])
    assert torch.equal(colours.foreground(tokens), mask)
    assert colours.share == pytest.approx(mask.float().mean().item())
    other = PatchColours(lambda: [tokens], "negative")
    assert torch.equal(other.foreground(tokens), ~mask)


@pytest.mark.parametrize("place", ["columns", "rows", "a corner"])
def test_an_object_may_reach_the_border(place):
    """The sign is that of all four sides, not of two of them or of a corner."""
    noise = torch.randn(8, 8, 12, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    if place == "a corner":
        mask[2:6, 2:6] = mask[:2, :2] = True
    else:
        mask[:, 1:7] = True
    mask = mask.T if place == "rows" else mask
    for shift in (5.0, -5.0):
        tokens = 0.1 * noise + shift * mask[..., None] * torch.eye(12)[0]
        assert torch.equal(PatchColours(lambda x=tokens: [x]).foreground(tokens), mask)


@pytest.mark.parametrize("side", range(4))
def test_an_object_may_reach_three_sides(side):
    mask = torch.rot90(torch.arange(8)[:, None].expand(8, 8) < 5, side)
    tokens = 0.1 * torch.randn(8, 8, 12, generator=torch.Generator().manual_seed(0))
    tokens += 5 * mask[..., None] * torch.eye(12)[0]
    assert torch.equal(PatchColours(lambda: [tokens]).foreground(tokens), mask)


@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_the_border_is_that_of_all_images(shift):
    tokens, mask = scene(shift=shift)
    tokens += 10 * torch.eye(12)[0]
    inverted = torch.where(mask[..., None], tokens[0, 0], tokens[3, 3])  # the object is at the border
    colours = PatchColours(lambda: [tokens, tokens, inverted])
    assert torch.equal(colours.foreground(tokens), mask)
    assert torch.equal(colours.foreground(inverted), ~mask)


def test_only_the_background_is_black_and_red_varies_most():
    tokens, mask = scene()
    picture = PatchColours(lambda: [tokens])(tokens)
    assert picture.shape == (8, 8, 3) and picture.dtype == torch.uint8
    assert torch.equal((picture > 0).all(dim=-1), mask) and (picture[~mask] == 0).all()
    inside = picture[mask].float()
    assert inside.min() >= 25 and inside.max() == 255
    for channel in range(3):  # each colour is one of the planted differences
        correlation = torch.corrcoef(torch.stack([inside[:, channel], tokens[mask][:, 1 + channel]]))[0, 1]
        assert abs(correlation) > 0.8


def test_one_fit_serves_all_images():
    first, second = scene(0)[0], scene(1)[0] + 0.5
    together = PatchColours(lambda: [first, second])
    alone = PatchColours(lambda: [first])
    assert not torch.equal(together(first), alone(first))
    mixed = first.clone()
    mixed[3, 3] = second[4, 4]
    assert torch.equal(together(mixed)[3, 3], together(second)[4, 4])  # equal tokens, equal colours


def test_full_colour_stands_for_two_deviations():
    rows = torch.zeros(1, 400, 4)
    rows[..., :3] = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [3.0, 2, 1]
    )
    colours = PatchColours(lambda: [rows], "all")
    scores, picture = colours.components.scores(rows), colours(rows)
    assert colours.share == 1
    assert ((picture > 25) & (picture < 255))[scores.abs() < 1.99].all() and (
        picture[scores > 2] == 255
    ).all()


def test_without_a_background_all_patches_have_colours():
    tokens, _ = scene()
    colours = PatchColours(lambda: [tokens], "all")
    assert colours.share == 1 and (colours(tokens) > 0).all()


def test_images_that_are_all_border_have_components_too():
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, 2, 8, generator=generator) for _ in range(5)]
    assert 0 < PatchColours(lambda: images).share < 1


@pytest.mark.parametrize(
    ("tokens", "side", "message"),
    [
        (torch.rand(1, 3, 8), "all", "3 patches have 2 of the 3 principal components"),
        (torch.rand(1, 1, 8), "positive", "1 patches have 0 of the 1 principal components"),
        (torch.ones(6, 6, 8), "all", "36 patches have 0 of the 3"),
        (torch.eye(8)[0] * torch.arange(9.0).view(3, 3, 1), "positive", "patches have 1 of the 3"),
    ],
)
def test_too_few_patches_are_named(tokens, side, message):
    with pytest.raises(UserError, match=message) as error:
        PatchColours(lambda: [tokens], side)
    assert "(--pca): give more or larger images" in str(error.value)
