"""Videos survive what ends their writer, keep their size and rate, and cost no memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from streamgen import media
from streamgen.errors import InputError
from streamgen.media import MediaError, Pacer, RawSink, open_sink, read_video
from streamgen.media.video import _has_hybrid, ffmpeg_exe

ROOT = Path(__file__).resolve().parents[2]


def moving_blocks(frames: int = 24, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """Coloured 8×8 blocks drifting to the right: something a codec can hold on to."""
    rng = np.random.default_rng(seed)
    still = rng.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    still = still.repeat(8, 0).repeat(8, 1)[:height, :width]
    return np.stack([np.roll(still, 2 * i, 1) for i in range(frames)])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def child(code: str, **options) -> subprocess.Popen:
    """A Python process in which `streamgen.media` is this checkout's."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


# Mean error out of 255, for sharp blocks at quality 8: half-size colour planes cost about 3, odd VP9 edges more.
@pytest.mark.parametrize(("suffix", "tolerance"), [(".mp4", 5), (".mkv", 5), (".webm", 8), (".gif", 1)])
def test_what_is_written_is_read(tmp_path, suffix, tolerance):
    frames = moving_blocks()
    path = tmp_path / f"clip{suffix}"
    with open_sink(path, fps=16) as sink:
        assert isinstance(sink, media.VideoSink)
        sink.write(frames[:5])
        sink.write(frames[5:5])  # nothing, which is allowed
        sink.write(frames[5:])
    assert (sink.path, sink.frames) == (path, 24)
    back = read_video(path)
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert distance(back, frames) < tolerance
    assert media.video_info(path).seconds == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".gif"])
def test_odd_sizes_are_not_resized(tmp_path, suffix):
    frames = moving_blocks(6, 53, 37)
    path = tmp_path / f"odd{suffix}"
    with open_sink(path, size=(53, 37)) as sink:
        sink.write(frames)
    assert read_video(path).shape == frames.shape
    assert distance(read_video(path), frames) < 20


@pytest.mark.parametrize("fps", [8, 23.976, 30])
def test_rate_is_kept(tmp_path, fps):
    with open_sink(tmp_path / "rate.mp4", fps=fps) as sink:
        sink.write(moving_blocks(12))
    assert media.video_info(tmp_path / "rate.mp4").fps == pytest.approx(fps, abs=0.01)


def test_colours_are_kept(tmp_path):
    """Saturated colours come back: the file says which matrix made its YUV."""
    colours = np.array([[225, 40, 45], [50, 90, 230], [20, 75, 30], [245, 245, 245], [8, 8, 10]], np.uint8)
    frames = np.broadcast_to(colours.repeat(16, 0), (4, 32, 80, 3)).copy()
    with open_sink(tmp_path / "colours.mp4") as sink:
        sink.write(frames)
    back = read_video(tmp_path / "colours.mp4")[2, 16, 8::16].astype(int)
    assert np.abs(back - colours).max() <= 4  # two roundings to limited range


def test_folder_of_frames_is_exact(tmp_path):
    frames = moving_blocks(5, 33, 21)
    with open_sink(f"{tmp_path}/frames/") as sink:
        sink.write(frames[:2])
        sink.write(frames[2:])
    assert sorted(p.name for p in sink.path.iterdir()) == [f"frame_{i:06d}.png" for i in range(5)]
    np.testing.assert_array_equal(read_video(sink.path), frames)
    with pytest.raises(InputError, match="holds frames already"):
        open_sink(sink.path)


def test_raw_frames_are_the_bytes_and_a_reader_that_leaves_is_a_broken_pipe(tmp_path):
    frames = moving_blocks(5)
    with open(tmp_path / "raw", "wb") as file, RawSink(file) as sink:
        sink.write(frames)
    assert sink.frames == 5 and (tmp_path / "raw").read_bytes() == frames.tobytes()
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError), open(writer, "wb") as file, RawSink(file) as sink:
        sink.write(frames)
    if Path("/dev/full").exists():
        with pytest.raises(MediaError, match="frame 0: No space left"), open("/dev/full", "wb") as file:
            RawSink(file).write(frames)


def test_quality_is_size(tmp_path):
    for quality in (2, 9):
        with open_sink(tmp_path / f"{quality}.mp4", quality=quality) as sink:
            sink.write(moving_blocks(16))
    assert (tmp_path / "2.mp4").stat().st_size < (tmp_path / "9.mp4").stat().st_size


def test_clean_close_leaves_an_ordinary_mp4(tmp_path):
    if not _has_hybrid(ffmpeg_exe()):
        pytest.skip("this ffmpeg is older than 7.1: the file stays fragmented")
    path = tmp_path / "clip.mp4"
    with open_sink(path) as sink:
        sink.write(moving_blocks(40))
    boxes, data = [], path.read_bytes()
    while data:
        size = int.from_bytes(data[:4], "big")
        size = int.from_bytes(data[8:16], "big") if size == 1 else size
        boxes.append(data[4:8])
        data = data[size:]
    assert b"moof" not in boxes and boxes.count(b"moov") == 1


WRITER = """
    import sys
    import numpy as np
    from streamgen.media import open_sink
    sink = open_sink(sys.argv[1], fps=16, size=(64, 64))
    print(sink.process.pid, flush=True)
    frames = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
    for i in range(10):
        sink.write(frames)
    print("written", flush=True)
    while True:
        sink.write(frames[:1])
"""


def writer(path: Path) -> tuple[subprocess.Popen, int]:
    process = child(WRITER.replace("sys.argv[1]", repr(str(path))))
    pid = int(process.stdout.readline())
    assert process.stdout.readline() == "written\n"
    return process, pid


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_writer_leaves_a_playable_file(tmp_path):
    """kill -9, in the middle of writing; then ffmpeg itself as well, as when a machine runs out of memory."""
    path = tmp_path / "killed.mp4"
    process, encoder = writer(path)
    process.kill()
    os.kill(encoder, signal.SIGKILL)
    process.communicate()
    back = read_video(path)
    assert len(back) >= 16 and back.shape[1:] == (64, 64, 3)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupt_leaves_a_finished_file(tmp_path):
    """Ctrl-C goes to the whole process group; ffmpeg is not in it and completes the file when its input ends."""
    path = tmp_path / "interrupted.mp4"
    process, _ = writer(path)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
    for _ in range(200):  # the encoder outlives its parent by a moment
        try:
            if len(read_video(path)) >= 160:
                break
        except InputError:
            pass
    assert len(read_video(path)) >= 160


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full_is_one_line(tmp_path):
    path = tmp_path / "full.mp4"
    path.symlink_to("/dev/full")
    with pytest.raises(MediaError, match="No space left on device; nothing playable was kept") as caught:
        with open_sink(path) as sink:
            for _ in range(100):
                sink.write(moving_blocks(16))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="closed"):
        sink.write(moving_blocks(1))
    sink.close()


@pytest.mark.skipif(os.name != "posix", reason="resource limits")
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_disk_full_on_the_way_keeps_the_beginning(tmp_path, suffix):
    path = tmp_path / f"limited{suffix}"
    code = f"""
        import resource
        import numpy as np
        from streamgen.media import MediaError, open_sink
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        frames = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
        try:
            with open_sink({str(path)!r}, fps=16) as sink:
                for i in range(200):
                    sink.write(frames)
        except MediaError as error:
            print(error)
    """
    out, err = child(code).communicate(timeout=60)
    assert "File too large; what was written before stays and plays" in out, out + err
    assert len(read_video(path)) > 0


def test_encoder_gone_is_one_line(tmp_path):
    path = tmp_path / "gone.mp4"
    with pytest.raises(MediaError, match="writing stopped near frame"):
        with open_sink(path, size=(64, 96)) as sink:
            sink.write(moving_blocks(200))
            sink.process.kill()
            for _ in range(50):
                sink.write(moving_blocks(16))


def test_an_error_of_the_caller_is_not_masked(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with open_sink(tmp_path / "clip.mp4") as sink:
            sink.write(moving_blocks(20))
            raise ZeroDivisionError
    assert len(read_video(tmp_path / "clip.mp4")) == 20


def test_paths_that_cannot_be_written_are_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    cases = {
        tmp_path / "nowhere" / "clip.mp4": "does not exist; create it",
        tmp_path / "folder.mp4": "is a folder; give a file name",
        tmp_path / "file" / "clip.mp4": "is not a folder",
        tmp_path / "clip.txt": "unknown kind '.txt'; use .mp4",
        tmp_path / "file": "is a file; choose a folder",
        tmp_path / "nowhere" / "frames": "does not exist",
    }
    for path, reason in cases.items():
        with pytest.raises(InputError, match=reason) as caught:
            open_sink(path)
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.mp4"]  # and nothing is left behind


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a file system that refuses even root")
@pytest.mark.parametrize("name", ["clip.mp4", "frames"])
def test_no_permission_is_refused_at_once(name):
    with pytest.raises(InputError, match="choose a place that you may write to"):
        open_sink(Path("/sys/kernel") / name)


def test_an_existing_file_survives_until_the_first_frame(tmp_path):
    path = tmp_path / "old.mp4"
    path.write_bytes(b"precious")
    open_sink(path).close()
    assert path.read_bytes() == b"precious"
    with open_sink(path) as sink:
        sink.write(moving_blocks(2))
    assert len(read_video(path)) == 2


def test_names_that_look_like_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "http:clip.mp4", "a %d b.mp4"):
        with open_sink(name) as sink:
            sink.write(moving_blocks(2))
        assert len(read_video(name)) == 2


def test_wrong_frames_are_refused(tmp_path):
    sink = open_sink(tmp_path / "clip.mp4")
    for wrong in (np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), [1]):
        with pytest.raises(ValueError, match="uint8 array"):
            sink.write(wrong)
    sink.write(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="one size"):
        sink.write(np.zeros((1, 8, 16, 3), np.uint8))
    sink.close()
    sink.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_memory_does_not_grow(tmp_path, suffix):
    def resident(pid: int) -> int:  # kB
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    frames = moving_blocks(50, 32, 32)
    with open_sink(tmp_path / f"long{suffix}") as sink:
        for _ in range(6):
            sink.write(frames)
        before = resident(os.getpid()), resident(sink.process.pid)
        for _ in range(40):
            sink.write(frames)
        after = resident(os.getpid()), resident(sink.process.pid)
    assert sink.frames == 2300
    # 2000 frames are 6 MB raw; ffmpeg keeps about 100 bytes of index for each
    assert after[0] - before[0] < 2000 and after[1] - before[1] < 4000, (before, after)


def test_reading_what_is_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    cases = {"text.mp4": "finds no video", "missing.mp4": "no such file", ".": "no frames"}
    for name, reason in cases.items():
        with pytest.raises(InputError, match=reason) as caught:
            read_video(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_contact_sheet_and_images(tmp_path):
    clips = [moving_blocks(10, 16, 24), moving_blocks(4, 20, 20, seed=1)]
    sheet = media.contact_sheet(clips, columns=5)
    assert sheet.dtype == np.uint8 and sheet.shape == (4 + 2 * 24, 4 + 5 * 28, 3)
    np.testing.assert_array_equal(sheet[4:20, 4:28], clips[0][0])
    np.testing.assert_array_equal(sheet[4:20, 4 + 4 * 28 : 28 + 4 * 28], clips[0][9])  # spread: the last frame is there
    labelled = media.contact_sheet(clips, columns=3, labels=["first", "a label too long for its sheet"], every=2)
    assert labelled.shape == (4 + 2 * 16 + 3 * 24, 4 + 3 * 28, 3)  # 5 frames in two rows, 2 in one
    assert labelled[4:18].max() > 200  # text
    path = media.save_image(tmp_path / "sheet.png", sheet)
    from PIL import Image

    np.testing.assert_array_equal(np.array(Image.open(path)), sheet)
    with pytest.raises(InputError, match="does not exist"):
        media.save_image(tmp_path / "nowhere" / "sheet.png", sheet)
    with pytest.raises(InputError, match="unknown kind"):
        media.save_image(tmp_path / "sheet.mp4", sheet)


class FakeTime:
    def __init__(self) -> None:
        self.now, self.slept = 100.0, []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + 0.003  # as real ones do, it oversleeps


def test_pacer_does_not_drift():
    fake = FakeTime()
    pacer = Pacer(16, clock=fake.clock, sleep=fake.sleep)
    assert pacer.wait(12) == 0 and fake.slept == []  # the first frames are due at once
    for _ in range(1000):
        fake.now += 0.2  # producing a chunk
        assert pacer.wait(12) == 0
    assert fake.now == pytest.approx(100 + 1000 * 12 / 16 + 0.003)  # one oversleep, not a thousand


def test_pacer_reports_lateness_and_catches_up():
    fake = FakeTime()
    pacer = Pacer(10, clock=fake.clock, sleep=fake.sleep)
    pacer.wait(5)
    fake.now += 0.8
    assert pacer.wait(5) == pytest.approx(0.3)
    assert pacer.lateness == pacer.worst == pytest.approx(0.3)
    assert pacer.wait(5) == 0 and fake.slept == [pytest.approx(0.2)]  # due at 1.0, where it would have been anyway
    assert pacer.worst == pytest.approx(0.3) and pacer.frames == 15
    pacer.reset()
    fake.now += 60
    assert pacer.wait(5) == 0


def test_pacer_starts_again_after_a_stall():
    fake = FakeTime()
    pacer = Pacer(10, clock=fake.clock, sleep=fake.sleep, max_late=1.0)
    pacer.wait(5)
    fake.now += 10
    assert pacer.wait(5) == pytest.approx(9.5)
    assert pacer.wait(5) == 0 and fake.slept == [pytest.approx(0.5)]
    with pytest.raises(ValueError, match="positive"):
        Pacer(0)
