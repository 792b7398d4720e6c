import numpy as np
import torch
from PIL import Image

from support.pictures import (
    as_picture,
    bands,
    contact_sheet,
    enlarge,
    glow,
    heat_map,
    mark_patch,
    side_by_side,
    titled_rows,
)


def test_patches_become_blocks():
    blocks = enlarge(torch.tensor([[[1, 2], [3, 4]]]), (4, 6))
    assert blocks.tolist() == [[[1, 1, 1, 2, 2, 2]] * 2 + [[3, 3, 3, 4, 4, 4]] * 2]
    rows = enlarge(torch.tensor([[1.0], [2.0]]), (82, 1))  # 41 * (2 / 82) is less than 1 in float32
    assert rows.flatten().tolist() == [1.0] * 41 + [2.0] * 41


def test_a_picture_of_many_channels_shows_the_first_three_and_of_two_the_first():
    pixels = torch.arange(5, dtype=torch.uint8).view(5, 1, 1)
    assert as_picture(pixels).getpixel((0, 0)) == (0, 1, 2)
    assert as_picture(pixels[3:]).getpixel((0, 0)) == 3


def test_a_sheet_keeps_relative_sizes():
    large, small = Image.new("RGB", (64, 32)), Image.new("RGB", (32, 32))
    sheet = np.asarray(contact_sheet([[large, small]], side=128))
    assert sheet.shape == (4 + 132, 4 + 2 * 132, 3)
    black = (sheet == 0).all(-1)
    assert black[:, :136].sum() == 128 * 64 and black[:, 136:].sum() == 64 * 64


def test_a_heat_map_reaches_from_zero_to_its_largest_value_or_to_the_one_given():
    values = torch.tensor([[0.0, 0.1], [0.2, 0.4]])
    own, wider, narrower = (np.asarray(heat_map(values, top)) for top in (None, 0.8, 0.2))
    assert own[[0, 1, 1], [0, 0, 1]].tolist() == [[0, 0, 4], [186, 57, 82], [252, 255, 164]]  # inferno's
    assert np.array_equal(own, np.asarray(heat_map(2 * values)))
    assert np.array_equal(wider[1, 1], own[1, 0])  # half of the scale
    assert np.array_equal(narrower[1, 0], narrower[1, 1]) and np.array_equal(narrower[1, 1], own[1, 1])
    assert np.array_equal(np.asarray(heat_map(values - 0.1, 0.4))[0, 0], own[0, 0])  # below 0
    assert np.asarray(heat_map(torch.zeros(2, 2))).shape == (2, 2, 3)


def test_attention_glows_smoothly_on_one_scale_for_all_images():
    image = Image.new("RGB", (40, 32), (100, 100, 100))
    even, peak = torch.full((4, 5), 0.05), torch.full((4, 5), 0.7 / 19)
    peak[1, 3] = 0.3
    dim, bright = (np.asarray(glow(image, attention), int) for attention in (even, peak))
    assert dim.shape == (32, 40, 3) and len(np.unique(dim.reshape(-1, 3), axis=0)) == 1
    assert np.array_equal(dim, np.asarray(glow(image, 7 * even)))  # only shares matter
    weight = 8**-0.5  # the root of the mean's share of the scale, also over the darkened image
    heat = np.asarray(heat_map(torch.full((1, 1), weight), 1.0), float)[0, 0]
    np.testing.assert_allclose(dim[0, 0], 60 + weight * (heat - 60), atol=1.5)
    light = bright.sum(axis=-1)
    assert light[12, 28] > 1.5 * dim[0, 0].sum()  # in the middle of the peak's patch
    assert (light[:8, :16] <= dim[0, 0].sum()).all()
    assert len(np.unique(light[12, 16:28])) > 6  # no steps


def test_rows_have_their_pictures_below_their_titles():
    red, green, blue = ([Image.new("RGB", (60, 60), colour)] * 3 for colour in ("red", "lime", "blue"))
    sheet = np.asarray(titled_rows("Title", [("first", red), ("second", green), ("third", blue)]))
    found = []
    for channel in range(3):
        tile = np.zeros(3, int)
        tile[channel] = 255
        places = np.argwhere((sheet == tile).all(axis=-1))
        assert len(places) == 3 * 60 * 60
        found.append(places)
    tops, lefts = [places[:, 0].min() for places in found], {places[:, 1].min() for places in found}
    assert tops == sorted(tops) and len(lefts) == 1
    for last, top in zip([0, *(places[:, 0].max() + 1 for places in found[:2])], tops, strict=True):
        assert (sheet[last:top] < 128).any()  # a title


def test_the_frame_of_a_patch():
    picture = Image.new("RGB", (32, 24), "white")
    marked = np.asarray(mark_patch(picture, row=2, column=1, patch_size=8))
    red = (marked == (255, 0, 0)).all(axis=-1)
    frame = np.zeros((24, 32), dtype=bool)
    frame[16:24, 8:16] = True
    frame[17:23, 9:15] = False
    assert np.array_equal(red, frame) and picture.getcolors() == [(32 * 24, (255, 255, 255))]


def test_columns_are_broken_into_bands():
    columns = [[Image.new("RGB", (4, 4), (i, 0, 0)), Image.new("RGB", (4, 4), (i, 1, 0))] for i in range(5)]
    rows = [[picture.getpixel((0, 0)) for picture in row] for row in bands(columns, most=3)]
    white = (255, 255, 255)
    assert rows == [
        [(0, 0, 0), (1, 0, 0), (2, 0, 0)],
        [(0, 1, 0), (1, 1, 0), (2, 1, 0)],
        [(3, 0, 0), (4, 0, 0), white],
        [(3, 1, 0), (4, 1, 0), white],
    ]
    assert [len(row) for row in bands(columns[:2])] == [2, 2]


def test_pictures_side_by_side_keep_their_pixels():
    joined = side_by_side([Image.new("RGB", (3, 2), "red"), Image.new("L", (4, 2), 7)])
    assert (
        joined.size == (7, 2)
        and joined.getpixel((2, 1)) == (255, 0, 0)
        and joined.getpixel((3, 0)) == (7, 7, 7)
    )
