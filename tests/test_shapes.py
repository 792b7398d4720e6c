import numpy as np
import pytest
from PIL import Image

from support.shapes import Scene, Shapes
from tests.miniature import CLOSE_UP


def test_images_depend_on_split_and_index_alone():
    first, again, other = Shapes("train", 10), Shapes("train", 99), Shapes("val", 10)
    image, label = first[3]
    assert image.mode == "RGB" and image.size == (96, 96) and 0 <= label < len(Shapes.classes)
    assert image.tobytes() == again[3][0].tobytes() and image.tobytes() != other[3][0].tobytes()
    assert len(first) == 10 and len(Shapes.classes) == 8


def test_images_are_those_of_the_results_in_the_readme():
    expected = [
        (3, [119, 205, 116, 108], 2103), (4, [147, 154, 101, 107], 1124), (5, [130, 133, 149, 116], 1436),
        (3, [146, 129, 138, 115], 1482), (4, [165, 122, 114, 235], 1422), (6, [113, 106, 148, 254], 1297),
    ]  # fmt: skip
    for i, (number, grey, area) in enumerate(expected):
        pixels, label, mask = Shapes("val", 6).draw(i)
        assert label == number and abs(int(mask.sum()) - area) <= 2
        assert pixels[24::48, 24::48].mean(axis=-1).flatten() == pytest.approx(grey, abs=2)


@pytest.mark.parametrize("scene", [Scene(), CLOSE_UP])
def test_an_image_is_the_same_in_any_size(scene):
    for i in range(5):
        (pixels, label, mask), large = (
            Shapes("val", 5, scene._replace(size=size)).draw(i) for size in (64, 256)
        )
        reduced = np.asarray(Image.fromarray(large[0]).reduce(4), float)
        item = Shapes("val", 5, scene._replace(size=64))[i]
        assert item[0].tobytes() == pixels.tobytes() and item[1] == label
        assert label == large[1] and np.abs(pixels - reduced).mean() < 8
        assert (mask != large[2][2::4, 2::4]).mean() < 0.02


def test_classes_are_balanced():
    shapes = Shapes("train", 800)
    counts = np.bincount([shapes[i][1] for i in range(800)], minlength=8)
    assert counts.min() > 60 and counts.max() < 140


def test_the_texture_is_as_its_class_is_called():
    """Fine is steeper than broad; stripes have one direction, which differs from image to image."""
    steep, aligned, angles = {}, {}, []
    for name in Shapes.classes:
        found = []
        for seed in range(8):
            tone = Shapes("val", 1)._texture(np.random.default_rng(seed), name, np.array([48.0, 48.0]))
            down, right = np.gradient(tone)
            found.append((right + 1j * down) ** 2)  # opposite slopes have the same square
        steep[name] = np.abs(found).mean()
        aligned[name] = np.mean([abs(squares.mean()) / np.abs(squares).mean() for squares in found])
        angles += [np.angle(squares.mean()) for squares in found] if name == "stripes" else []
    for kind in ("stripes", "checks"):
        assert 1.5 * steep[f"broad {kind}"] < steep[kind] < steep[f"fine {kind}"] / 1.5
        assert (aligned[kind] > 0.5) == (kind == "stripes") and (aligned[kind] < 0.3) == (kind == "checks")
    assert steep["blobs"] < steep["fine blobs"] / 1.5 and aligned["blobs"] < 0.5
    assert np.abs(np.exp(1j * np.array(angles)).mean()) < 0.7


def test_the_mask_is_the_object():
    """Redrawn with another texture, place and outline being the same, only the mask changes."""

    class Flat(Shapes):
        def _texture(self, rng, name, center):
            tone = super()._texture(rng, name, center)  # draws the same numbers
            return np.where(self.x > self.size / 2, 1.0, -1.0) if self.flat else tone

    shapes = Flat("val", 20)
    for i in range(20):
        shapes.flat = False
        pixels, _, mask = shapes.draw(i)
        shapes.flat = True
        changed = (shapes.draw(i)[0] != pixels).any(axis=-1)
        inside = np.asarray(Image.fromarray(mask).resize((96, 96)))
        grown = np.zeros_like(inside)  # by one pixel: the edge is covered in part
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                grown |= np.roll(inside, (dy, dx), (0, 1))
        assert not (changed & ~grown).any()
        assert changed[inside].mean() > 0.85  # all but those that are black or white in both
        assert 0.05 < mask.mean() < 0.3


def test_brightness_says_nothing_about_the_class():
    shapes = Shapes("train", 400)
    brightness = [[] for _ in Shapes.classes]
    for i in range(400):
        pixels, label, mask = shapes.draw(i)
        brightness[label].append(pixels[mask].mean())
    for statistic in (np.mean, np.std):
        found = [statistic(values) for values in brightness]
        assert max(found) - min(found) < (10 if statistic is np.mean else 5)  # grey levels of 255


def test_an_unknown_split_is_an_error():
    with pytest.raises(KeyError, match="test"):
        Shapes("test", 10)
