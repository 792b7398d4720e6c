"""Small data sets and closed-form weights for the parity of the paper's other evaluations.

    python -m tests.data.eval_inputs OUT

writes, the same bytes on every machine up to the JPEG encoder:

    OUT/weights.pth            ViT-tiny/16, backbone only, as the published files are (`fill_model` of golden.py)
    OUT/retrieval/roxford5k/   gnd_roxford5k.pkl and jpg/, in the layout of the revisited Oxford benchmark
    OUT/copydays/              original, strong, jpegqual/Q, crops/P in the layout of Copydays (24 and 30 files a block)
    OUT/distractors, OUT/whitening     folders of images
    OUT/davis/                 ImageSets/2017/val.txt, JPEGImages/480p, Annotations/480p: two clips of six frames

`evals.json` beside this script holds what the published scripts print for them, `masks/` the masks they write.
"""
import os
import pickle
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance


def scene(seed, width, height):
    """A smooth colour field with a few drawn objects."""
    rng = np.random.RandomState(seed)
    field = Image.fromarray(rng.randint(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    draw = ImageDraw.Draw(field)
    for _ in range(6):
        x, y, r = rng.randint(0, width), rng.randint(0, height), rng.randint(5, max(6, height // 4))
        colour = tuple(int(c) for c in rng.randint(0, 256, 3))
        (draw.ellipse if rng.rand() < 0.5 else draw.rectangle)((x - r, y - r, x + r, y + r), fill=colour)
    return field


def save(image, *path):
    path = os.path.join(*path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image.save(path, quality=95, subsampling=0) if path.endswith(".jpg") else image.save(path)


def distort(image, seed):
    """Another look at the same scene: cropped, rotated a little, brighter or darker."""
    rng = np.random.RandomState(seed)
    w, h = image.size
    image = image.rotate(float(rng.uniform(-25, 25)), Image.BICUBIC)
    x, y = int(rng.uniform(0, 0.35) * w), int(rng.uniform(0, 0.35) * h)
    image = image.crop((x, y, x + int(0.65 * w), y + int(0.65 * h)))
    return ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.5, 1.5)))


def retrieval(out):
    root = os.path.join(out, "retrieval", "roxford5k")
    names, queries, truth = [], [], []
    places = [scene(100 + p, 240 + 10 * p, 180) for p in range(7)]
    for p, place in enumerate(places):
        for v in range(8):
            names.append(f"place{p}_{v:03}")
            save(distort(place, 1000 + 10 * p + v), root, "jpg", names[-1] + ".jpg")
    for i in range(20):
        names.append(f"other_{i:03}")
        save(scene(500 + i, 200, 260), root, "jpg", names[-1] + ".jpg")
    for p, place in enumerate(places):
        queries.append(f"query{p}")
        save(place, root, "jpg", queries[-1] + ".jpg")
        own = [8 * p + v for v in range(8)]
        # the last query has no positive at all, the one before none that is hard
        easy, hard, junk = (own[:3], own[3:6], own[6:]) if p < 5 else ((own[:4], [], own[4:]) if p == 5 else ([], [], own))
        w, h = place.size
        truth.append({"bbx": [0.1 * w, 0.1 * h, 0.8 * w, 0.8 * h], "easy": np.array(easy, int), "hard": np.array(hard, int), "junk": np.array(junk, int)})
    with open(os.path.join(root, "gnd_roxford5k.pkl"), "wb") as file:
        pickle.dump({"imlist": names, "qimlist": queries, "gnd": truth}, file)


QUALITIES, CROPS, ORIGINALS, STRONG = [3, 5, 8, 10, 15, 20, 30, 50, 75], [10, 15, 20, 30, 40, 50, 60, 70, 80], 24, 30


def copydays(out):
    root = os.path.join(out, "copydays")
    for i in range(ORIGINALS):
        image = scene(2000 + i, 160, 120 + 8 * (i % 3))
        name = f"{2000 + i}00.jpg"
        save(image, root, "original", name)
        for q in QUALITIES:
            path = os.path.join(root, f"jpegqual/{q}", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            image.resize((80, 60)).save(path, quality=q)
        for p in CROPS:
            cut = int(image.width * p / 200)
            save(image.crop((cut, cut * image.height // image.width, image.width - cut, image.height - cut * image.height // image.width)), root, f"crops/{p}", name)
    for i in range(STRONG):
        original = 2000 + i % ORIGINALS
        save(distort(scene(original, 160, 120 + 8 * (i % ORIGINALS % 3)), 3000 + i), root, "strong", f"{original}{i // ORIGINALS + 1:02}.jpg")
    for folder, count, seed in (("distractors", 30, 4000), ("whitening", 40, 5000)):
        for i in range(count):
            save(scene(seed + i, 150, 130), out, folder, f"{i:03}.jpg")


def davis(out):
    root = os.path.join(out, "davis")
    clips = {"wide": (200, 120), "tall": (120, 168)}
    for c, (clip, (width, height)) in enumerate(clips.items()):
        ground = scene(6000 + c, width, height)
        for t in range(6):
            frame, mask = ground.copy(), Image.new("P", (width, height))
            mask.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0] + [0] * 759)
            for k, (x, y, dx, dy, r) in enumerate([(0.3, 0.4, 7, 3, 20), (0.7, 0.6, -6, 4, 16)]):
                cx, cy = x * width + dx * t, y * height + dy * t
                box = (cx - r, cy - r, cx + r, cy + r)
                fill = [(250, 40, 30), (30, 60, 240)][k]
                for image, value in ((frame, fill), (mask, k + 1)):
                    (ImageDraw.Draw(image).ellipse if k == 0 else ImageDraw.Draw(image).rectangle)(box, fill=value)
            save(frame, root, "JPEGImages", "480p", clip, f"{t:05}.jpg")
            save(mask, root, "Annotations", "480p", clip, f"{t:05}.png")
    os.makedirs(os.path.join(root, "ImageSets", "2017"), exist_ok=True)
    with open(os.path.join(root, "ImageSets", "2017", "val.txt"), "w") as file:
        file.write("\n".join(clips) + "\n")


def weights(out):
    """Closed-form weights of our ViT, which has timm's parameter names."""
    from tests.golden import fill_model
    from vision_transformer import vit_tiny

    model = vit_tiny(patch_size=16)
    fill_model(model)
    torch.save(model.state_dict(), os.path.join(out, "weights.pth"))


def write(out):
    os.makedirs(out, exist_ok=True)
    for part in (retrieval, copydays, davis, weights):
        part(out)


if __name__ == "__main__":
    write(sys.argv[1])
    print(f"inputs in {sys.argv[1]}")
