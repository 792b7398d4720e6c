import re
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from support.errors import UserError
from support.video import Frames, comment_of, write_video


def plain(level: int, size: tuple[int, int] = (32, 16)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def make_video(path: Path, levels=range(20, 220, 20), size=(32, 16), rate=25) -> Path:
    with write_video(path, rate, "a test") as append:
        for level in levels:
            append(plain(level, size))
    return path


def make_frames(folder: Path, names: dict[str, Image.Image]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, image in names.items():
        image.save(folder / name)
    return folder


@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])
@pytest.mark.parametrize("rate", [25, Fraction(30_000, 1_001), 0.5, 240, Fraction(120_000, 1_001)])
def test_what_is_written_can_be_read(tmp_path, name, rate):
    path = make_video(tmp_path / name, rate=rate)
    frames = Frames(str(path))
    assert len(frames) == 10 and frames.size == (32, 16)
    assert float(frames.rate) == pytest.approx(float(rate), rel=1e-3)
    for _ in range(2):  # it can be read again
        levels = [np.asarray(frame).mean() for frame in frames]
        np.testing.assert_allclose(levels, range(20, 220, 20), atol=8)
    assert comment_of(path) == "a test"
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_player_of_h264_plays_it(tmp_path):
    with av.open(str(make_video(tmp_path / "a.mp4"))) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")


def test_odd_sides_lose_a_row_of_pixels(tmp_path):
    frames = Frames(str(make_video(tmp_path / "a.mp4", size=(33, 17))))
    assert frames.size == (32, 16)


def test_an_error_leaves_the_old_file(tmp_path):
    path = make_video(tmp_path / "a.mp4")
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), write_video(path, 25, "") as append:
        append(plain(0))
        append(1 / 0)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_frames_in_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    names = {f"frame{i}.png": plain(10 * i) for i in (10, 2, 1)}
    frames = Frames(str(make_frames(tmp_path, names)))
    assert [np.asarray(frame)[0, 0, 0] for frame in frames] == [10, 20, 100]
    assert len(frames) == 3 and frames.rate is None


def test_frames_are_read_one_at_a_time(tmp_path):
    frames = Frames(str(make_frames(tmp_path, {f"{i}.png": plain(i) for i in range(3)})))
    (tmp_path / "2.png").unlink()
    reading = iter(frames)
    assert [np.asarray(next(reading))[0, 0, 0] for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match="cannot read image"):
        next(reading)


def test_frames_are_turned_as_a_player_turns_them(tmp_path):
    path = tmp_path / "a.mp4"
    picture = plain(0)
    picture.paste((255, 255, 255), (0, 0, 16, 16))  # stored: white on the left
    with write_video(path, 25, "") as append:
        append(picture)
    # A camera that was turned writes a matrix into the track's header: by a quarter, clockwise.
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    matrix = np.array([0, 65_536, 0, -65_536, 0, 0, 0, 0, 2**30], ">i4").tobytes()
    assert data[start : start + 4] == b"\x00\x01\x00\x00"
    data[start : start + 36] = matrix
    path.write_bytes(data)
    frames = Frames(str(path))
    assert frames.size == (16, 32)
    shown = np.asarray(next(iter(frames)))
    assert shown[:12].mean() > 230 and shown[20:].mean() < 25  # white at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "b.jpg", exif=exif)
    path.unlink()
    frames = Frames(str(tmp_path))
    assert frames.size == (16, 32) and np.asarray(next(iter(frames)))[:12].mean() > 230


def sound(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8_000)
        file.writeframes(bytes(16_000))
    return path


def sound_with_cover(path: Path) -> Path:
    """As music is sold: a cover picture is a video stream of one frame."""
    picture = path.with_suffix(".png")
    plain(100).save(picture)
    with av.open(str(path), "w") as file, av.open(str(picture)) as cover:
        music = file.add_stream("aac", rate=8_000)
        stream = file.add_stream_from_template(cover.streams.video[0])
        stream.disposition = av.stream.Disposition.attached_pic
        for packet in cover.demux():
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8_000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8_000
        file.mux(music.encode(silence))
        file.mux(music.encode())
    return path


def without_frames(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        file.start_encoding()
    return path


def test_files_that_are_no_video_are_named(tmp_path):
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(5_000))
    cut = make_video(tmp_path / "cut.mp4", levels=range(50))
    cut.write_bytes(cut.read_bytes()[:600])  # without its index, which comes last
    empty = tmp_path / "empty.mp4"
    empty.touch()
    folder = make_frames(tmp_path / "none", {})
    differing = make_frames(tmp_path / "sizes", {"1.png": plain(0), "2.png": plain(0, (16, 16))})
    broken = make_frames(tmp_path / "broken", {"1.png": plain(0)})
    (broken / "2.png").write_bytes(b"not an image")
    for path, message in {
        tmp_path / "nowhere.mp4": "no such file",
        noise: "cannot read video: Invalid data",
        cut: "cannot read video: Invalid data",
        empty: "cannot read video: Invalid data",
        sound(tmp_path / "a.wav"): "no video in the file",
        sound_with_cover(tmp_path / "song.mp4"): "no video in the file",
        without_frames(tmp_path / "a.avi"): "no frames",
        folder: "no frames",
        differing: r"frames of different sizes: 32 x 16 and 16 x 16 \(number 2\)",
        broken: "cannot read image: .*2.png",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            Frames(str(path))
        assert str(path) in str(error.value), path
        assert path.is_dir() or comment_of(path) == ""


def test_a_video_that_breaks_off_is_named(tmp_path, capsys):
    path = make_video(tmp_path / "a.avi", levels=range(0, 250, 5), size=(320, 160))
    whole = path.read_bytes()
    assert len(Frames(str(path))) == 50 and capsys.readouterr().out == ""
    for share in (0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        try:  # depends on the place, and on the version of PyAV
            count = len(Frames(str(path)))
            assert f"warning: {path} states 50 frames, but has {count}: check" in capsys.readouterr().out
        except UserError as error:
            assert re.search(r"cannot read video after frame [1-4]\d: Invalid data", str(error))


def test_a_video_that_states_no_number_of_frames_is_not_suspected(tmp_path, capsys):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for level in range(3):
            file.mux(stream.encode(av.VideoFrame.from_image(plain(level))))
        file.mux(stream.encode())
    frames = Frames(str(path))
    assert (len(frames), frames.stated) == (3, 0) and capsys.readouterr().out == ""


def test_without_pyav_it_says_what_to_install(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4")
    folder = make_frames(tmp_path / "frames", {"1.png": plain(0)})
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not there
    with pytest.raises(UserError, match=r"videos need PyAV \(not installed\): pip install av"):
        Frames(str(path))
    assert len(Frames(str(folder))) == 1
    with pytest.raises(UserError, match="pip install av"), write_video(path, 25, ""):
        pass
