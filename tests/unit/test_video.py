from fractions import Fraction

import av
import numpy as np
import pytest

from vgr.data import video
from vgr.data.files import atomic


def moving_waves(frames=12, height=48, width=64):
    """Smooth frames, so that h264's loss is small and known."""
    f, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(0.15 * x + 0.2 * f), np.cos(0.11 * y - 0.1 * f), np.sin(0.05 * (x + y))]
    return (127.5 + 90 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def test_write_then_read_keeps_frames_and_times(tmp_path):
    frames = moving_waves()
    video.write_video(tmp_path / "a.mp4", frames, 35 / 2)
    back, times = video.read_video(tmp_path / "a.mp4")
    assert back.shape == frames.shape and back.dtype == np.uint8
    np.testing.assert_allclose(times, np.arange(len(frames)) * 2 / 35, atol=1e-4)
    assert psnr(frames, back) > 38
    # The colours are right, not only the shapes: a wrong YUV matrix shifts channel means by several levels.
    np.testing.assert_allclose(frames.mean((0, 1, 2)), back.mean((0, 1, 2)), atol=0.8)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_equal_frames_give_equal_bytes_and_bytes_are_read():
    frames = moving_waves(5)
    data = video.encode_video(frames, 16)
    assert data == video.encode_video(frames, 16)
    assert psnr(video.read_video(data)[0], frames) > 33


def test_iter_video_is_lazy_and_agrees(tmp_path):
    video.write_video(tmp_path / "a.mp4", moving_waves(), 8)
    first, time_s = next(iter(video.iter_video(tmp_path / "a.mp4")))
    assert time_s == 0 and (first == video.read_video(tmp_path / "a.mp4")[0][0]).all()


def test_what_is_no_video_is_refused_by_name(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n")
    for name in ("text.mp4", "list.mp4", "list.m3u8"):
        with pytest.raises(ValueError, match=name):
            video.read_video(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        video.read_video(tmp_path / "absent.mp4")
    with pytest.raises(FileNotFoundError):
        video.read_video("http://localhost/a.mp4")


def test_truncated_video_is_refused(tmp_path):
    data = video.encode_video(moving_waves(), 16)
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut.mp4"):
        video.read_video(tmp_path / "cut.mp4")


def test_odd_sizes_and_wrong_types_are_refused(tmp_path):
    with pytest.raises(ValueError, match="47x64"):
        video.write_video(tmp_path / "a.mp4", moving_waves(2, 47), 8)
    with pytest.raises(ValueError, match="uint8"):
        video.write_video(tmp_path / "a.mp4", moving_waves(2).astype(float), 8)
    assert not list(tmp_path.iterdir())


def test_read_image_cuts_the_middle_in_rgb(tmp_path):
    import cv2

    image = np.zeros((60, 200, 3), np.uint8)
    image[:, 60:140] = (255, 128, 0)  # the middle 80 columns are what a 4:3 cut of height 60 keeps
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1])
    out = video.read_image(tmp_path / "a.png", (48, 64))
    assert out.shape == (48, 64, 3) and (out == (255, 128, 0)).all()


def test_read_image_refuses_what_is_none(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name in ("a.png", "empty.png"):
        with pytest.raises(ValueError, match=name):
            video.read_image(tmp_path / name, (48, 64))
    with pytest.raises(FileNotFoundError):
        video.read_image(tmp_path / "absent.png", (48, 64))


def test_atomic_leaves_nothing_when_the_block_fails_and_keeps_the_old_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError), atomic(tmp_path / "a") as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_live_video_can_be_read_while_it_is_written(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (24, 32, 48, 3), dtype=np.uint8)
    path = tmp_path / "live.mp4"
    with path.open("wb") as out, video.video_stream(out, (32, 48), 16.0, live=True) as add:
        add(frames[:12])
        so_far, _ = video.read_video(path)
        add(frames[12:])
    whole, times = video.read_video(path)
    assert 10 <= len(so_far) <= 12 and len(whole) == 24
    assert np.array_equal(whole[: len(so_far)], so_far)
    np.testing.assert_allclose(np.diff(times), 1 / 16, atol=1e-6)


@pytest.mark.parametrize("turned", [0, 90])
def test_pixels_that_are_not_square_are_made_square(tmp_path, turned):
    """A disc squeezed into pixels three halves as wide as high is round again, so one focal length in pixels holds."""
    rows, columns = np.mgrid[:96, :80] + 0.5
    disc = np.hypot(rows - 48, (columns - 40) * 1.5) < 30
    with av.open(str(tmp_path / "wide.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 96, 80, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        if turned:
            stream.set_display_rotation(turned)
        for _ in range(2):
            image = np.repeat(disc[..., None], 3, axis=2).astype(np.uint8) * 255
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    frames, info = video.read_video(tmp_path / "wide.mp4")[0], video.probe(tmp_path / "wide.mp4")
    assert frames.shape[1:3] == info.size_hw == ((120, 96) if turned else (96, 120))
    assert "pixels of 3/2 made square" in info.notes
    bright = frames[0, ..., 0] > 128
    assert [int(bright.any(axis).sum()) for axis in (0, 1)] == pytest.approx([60, 60], abs=2)
