"""Reads the frames of a video one at a time, and writes a video one picture at a time.

Uses PyAV, whose wheels contain FFmpeg: pip install av.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from support.data import ImageFiles, describe, read_image
from support.errors import UserError
from support.files import by_number, replacing
from support.logger import log

# Encoders by the file's extension, the best first; FFmpeg may have been built without libx264.
ENCODERS = {"mp4": ("libx264", "mpeg4"), "avi": ("mpeg4",)}


def _av() -> Any:
    """The module `av`. Raises UserError."""
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV", "not installed", "pip install av") from None
    return av


class Frames:
    """The frames of a video file, or of a folder of image files, as RGB images of one size.

    Every iteration reads them again, one at a time, turned as a player shows them. The numbers in the names
    of image files count: frame2.png comes before frame10.png. Opening reads all of them once; it raises
    UserError for a file that is no video, or cannot be decoded, and for frames of different sizes.
    """

    rate: Fraction | None = None  # frames per second, where the file says it

    def __init__(self, path: str):
        self.path, self.images = path, None
        if not Path(path).exists():
            raise UserError("no such file", f"--video {path}", "check the path")
        if Path(path).is_dir():
            found = ImageFiles(path)
            log(f"frames: {path}: {describe(found)}")
            self.images = ImageFiles(*sorted(found.paths, key=by_number))
        self.count, self.size, self.stated = 0, (0, 0), 0
        for frame in self:
            self.size = self.size if self.count else frame.size
            if frame.size != self.size:
                sizes = " and ".join(f"{width} x {height}" for width, height in (self.size, frame.size))
                what = f"frames of different sizes: {sizes} (number {self.count + 1})"
                raise UserError(what, f"--video {path}", "give frames of one size")
            self.count += 1
        if not self.count:
            raise UserError("no frames", f"--video {path}", "give a video file, or a folder of images")
        if self.count < self.stated:  # PyAV does not always raise an error
            what = f"states {self.stated} frames, but has {self.count}"
            log(f"warning: {path} {what}: check whether it is cut short, trimmed or damaged")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Image.Image]:
        if self.images is None:
            yield from self._decoded()
            return
        for index in range(len(self.images)):
            image = read_image(self.images, index)[0]
            yield ImageOps.exif_transpose(image)  # type: ignore[arg-type]  # of RGB files

    def _decoded(self) -> Iterator[Image.Image]:
        av, number = _av(), 0
        where, fix = f"--video {self.path}", "give a video file that plays, or a folder of images"
        try:
            with av.open(self.path) as file:
                # An audio file can have a cover picture.
                streams = [
                    s for s in file.streams.video if not s.disposition & av.stream.Disposition.attached_pic
                ]
                if not streams:
                    raise UserError("no video in the file", where, fix)
                self.rate, self.stated = streams[0].average_rate, streams[0].frames
                for frame in file.decode(streams[0]):
                    number += 1
                    yield frame.to_image().rotate(frame.rotation, expand=True)
        except av.FFmpegError as error:
            place = f" after frame {number}" if number else ""
            raise UserError(f"cannot read video{place}: {error.strerror}", where, fix) from None


@contextlib.contextmanager
def write_video(path: Path, rate: float | Fraction, comment: str) -> Iterator[Callable[[Image.Image], None]]:
    """Yield a function that appends a picture to an .mp4 or .avi file; all have the size of the first.

    The file appears when the block ends without an error. `comment` is stored in it. An odd side loses its
    last row or column of pixels, because encoders need even ones. Raises UserError without PyAV.
    """
    av, extension = _av(), path.suffix[1:]
    encoder = next(name for name in ENCODERS[extension] if name in av.codecs_available)
    # mpeg4 takes no numerator above 65,535.
    exact = Fraction(rate).limit_denominator(min(1_001, max(1, 65_535 // math.ceil(rate))))
    with replacing(path) as file, av.open(file, "w", format=extension) as video:
        video.metadata["comment"] = comment
        stream = video.add_stream(encoder, rate=exact)
        stream.pix_fmt = "yuv420p"  # what all players play

        def append(picture: Image.Image) -> None:
            if not stream.codec_context.is_open:
                stream.width, stream.height = (side - side % 2 for side in picture.size)
                if encoder == "libx264":
                    stream.options = {"crf": "18"}
                else:
                    stream.bit_rate = int(0.4 * picture.width * picture.height * rate)
            picture = picture.crop((0, 0, stream.width, stream.height))
            video.mux(stream.encode(av.VideoFrame.from_image(picture)))

        yield append
        video.mux(stream.encode())  # what the encoder still holds


def comment_of(path: str | Path) -> str:
    """The comment stored in a video file; empty if there is none, or it is no video."""
    av = _av()
    with contextlib.suppress(av.FFmpegError), av.open(str(path)) as file:
        return file.metadata.get("comment", "")
    return ""
