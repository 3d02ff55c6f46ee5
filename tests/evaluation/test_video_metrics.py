"""Every metric moves the right way, by the right amount where it can be said, on videos made to show one thing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamgen.errors import InputError
from streamgen.evaluation.video import VideoMeter, compare_videos, file_metrics, video_metrics
from streamgen.evaluation.video_change import chunk_starts, seam_score
from streamgen.evaluation.video_drift import bin_means, drift
from streamgen.evaluation.video_features import VAEFeatures, frechet_distance, load_features
from streamgen.evaluation.video_frames import area_weights, block_means
from streamgen.evaluation.video_motion import match_blocks
from streamgen.evaluation.video_spectrum import FLOOR, spectra, spectral_distance
from streamgen.media import open_sink, read_video
from streamgen.worlds.sprites import render

PROMPTS = ("a red circle bouncing on a navy background", "a green star circling on a gray background")


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 200, (height, width, 3), dtype=np.uint8)


def square(positions, side: int = 24) -> np.ndarray:
    """A textured square on flat gray, at a column per frame: uint8 [F, 64, 96, 3]."""
    frames = np.full((len(positions), 64, 96, 3), 128, np.uint8)
    for frame, x in zip(frames, positions):
        frame[16 : 16 + side, x : x + side] = texture(side, side)
    return frames


def flat(levels) -> np.ndarray:
    """Even gray of a level per frame: uint8 [F, 16, 24, 3]."""
    return np.broadcast_to(np.asarray(levels, np.uint8)[:, None, None, None], (len(levels), 16, 24, 3)).copy()


def noise(frames: int = 33, size: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip():
    return render(PROMPTS[0], 49, seed=3)


# ---------------------------------------------------------------------------------------------- flicker and stagnation


def test_frozen_video_stands_still_in_every_metric():
    found = video_metrics(np.repeat(texture(32, 48)[None], 200, 0), fps=16, chunk_frames=12)
    assert found["stagnation"] == 1 and found["warping_consistency"] is None
    zero = ["flicker", "frame_difference", "warping_error", "dynamic_degree"]
    assert [found[name] for name in zero] == [0] * 4 and found["seam"] == 1
    drifts = [value for name, value in found.items() if "drift" in name]
    assert len(drifts) == 10 and max(map(abs, drifts)) < 1e-6


def test_flicker_is_what_goes_there_and_back():
    flickering = video_metrics(flat([100, 120] * 8), 16)
    fading = video_metrics(flat(range(100, 132)), 16)
    assert flickering["flicker"] == pytest.approx(20 / 255) == flickering["frame_difference"]
    assert fading["flicker"] == 0 and fading["frame_difference"] == pytest.approx(1 / 255)
    assert video_metrics(flat([1, 2]), 16)["flicker"] is None  # no frame has two neighbours


def test_motion_is_no_flicker(clip):
    shaken = clip.copy()
    shaken[::2] = np.maximum(shaken[::2], 20) - 20
    assert video_metrics(clip, 16)["flicker"] < 0.002 < 0.01 < video_metrics(shaken, 16)["flicker"]


def test_stagnation_is_the_share_of_pairs_without_motion(clip):
    moving = video_metrics(clip, 16)["stagnation"]
    stopped = video_metrics(np.concatenate([clip, np.repeat(clip[-1:], 48, 0)]), 16)["stagnation"]
    assert moving == 0 and stopped == 0.5
    shimmer = np.repeat(texture(32, 32)[None], 20, 0)
    shimmer[::2] += 2  # what a codec does to a still picture
    assert video_metrics(shimmer, 16)["stagnation"] == 1
    speck = np.repeat(texture(32, 32)[None], 20, 0)
    speck[::2, 8:12, 8:12] += 40  # a small thing that changes in a large still picture
    assert video_metrics(speck, 16)["stagnation"] == 0


# --------------------------------------------------------------------------------------------------------------- motion


def test_blocks_are_found_where_they_came_from():
    whole = block_means(np.random.default_rng(1).random((1, 80, 96)).astype(np.float32), 1)
    before, after = whole[:, 8:72, 8:88], whole[:, 5:69, 12:92]  # the picture moved by (3, -4)
    moved, change, rest = match_blocks(before, after)
    assert moved.shape == (1, 8, 10)
    assert np.all(moved[:, 1:-1, 1:-1] == 5) and np.all(rest[:, 1:-1, 1:-1] == 0)
    assert np.all(rest <= change) and change.min() > 0.1


def test_teleporting_is_worse_than_moving():
    columns = range(12, 72, 3)  # away from the edge, where nothing is known of what comes in
    smooth = video_metrics(square(columns), 16)
    jumping = video_metrics(square(np.random.default_rng(0).permutation(columns)), 16)
    assert smooth["warping_consistency"] == 1 and smooth["warping_error"] == 0
    assert jumping["warping_consistency"] < 0.6 and jumping["warping_error"] > 0.005
    assert video_metrics(noise(size=32), 16)["warping_consistency"] < 0.4


def test_sprites_move_consistently(clip):
    shuffled = clip[np.random.default_rng(0).permutation(len(clip))]
    truth, broken = video_metrics(clip, 16), video_metrics(shuffled, 16)
    assert truth["warping_consistency"] > 0.8 > broken["warping_consistency"]
    assert truth["warping_error"] < broken["warping_error"] / 3


def test_dynamic_degree_is_a_speed_in_picture_widths():
    wide = texture(64, 300)
    pan = {speed: np.stack([wide[:, 60 + speed * i :][:, :96] for i in range(24)]) for speed in (2, 5)}
    slow, fast = (video_metrics(pan[speed], 16)["dynamic_degree"] for speed in (2, 5))
    assert slow == pytest.approx(2 * 16 / 96, rel=0.25) and fast == pytest.approx(5 * 16 / 96, rel=0.25)
    assert video_metrics(pan[2], 32)["dynamic_degree"] == pytest.approx(2 * slow)
    large = pan[5].repeat(3, 1).repeat(3, 2)  # three times the size, averaged down again
    assert video_metrics(large, 16)["dynamic_degree"] == pytest.approx(fast, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------- drift


def test_fading_light_has_its_slope():
    found = video_metrics(flat(np.repeat(range(200, 170, -1), 8)), fps=8)  # one level per second, 30 s
    assert found["drift_luminance_per_minute"] == pytest.approx(-60 / 255, rel=1e-3)
    assert found["drift_luminance_change"] == pytest.approx(-25 / 255, rel=1e-3)
    assert abs(found["drift_saturation_change"]) < 1e-6 and abs(found["drift_contrast_change"]) < 1e-6


def test_each_look_drifts_by_itself():
    picture = texture(32, 48).astype(float)
    grey = picture @ [0.299, 0.587, 0.114]
    pale = np.stack([grey[..., None] + s * (picture - grey[..., None]) for s in np.linspace(1, 0.2, 96)])
    dull = np.stack([128 + s * (picture - 128) for s in np.linspace(1, 0.2, 96)])
    soft = np.stack([s * picture + (1 - s) * picture.mean((0, 1)) for s in np.linspace(1, 0.5, 96)])
    soft += np.linspace(0, 40, 96)[:, None, None, None] * np.sign(np.arange(48) - 24)[:, None]  # one broad edge instead
    pale, dull, soft = (video_metrics(np.rint(v).clip(0, 255).astype(np.uint8), 8) for v in (pale, dull, soft))
    assert pale["drift_saturation_per_minute"] < -0.5 and abs(pale["drift_luminance_change"]) < 0.01
    assert abs(pale["drift_contrast_change"]) < 0.01
    assert dull["drift_contrast_per_minute"] < -0.1 and abs(dull["drift_luminance_change"]) < 0.01
    assert soft["drift_sharpness_change"] < -0.05 < 0.01 < soft["drift_contrast_change"]


def test_bins_are_five_seconds_and_a_half_one_counts():
    times, means = bin_means(np.arange(100.0), fps=8)  # 40 + 40 + 20 frames
    assert times.tolist() == [2.5, 7.5, 11.25] and means.tolist() == [19.5, 59.5, 89.5]
    assert len(bin_means(np.arange(99.0), fps=8)[0]) == 2
    assert drift(np.arange(99.0), fps=8) == (pytest.approx(60 * 8), 40)
    assert drift(np.arange(59.0), fps=8) == (None, None)
    assert bin_means(np.empty((0, 8)), 2)[1].shape == (0, 8)


def test_short_clips_leave_metrics_undefined():
    found = video_metrics(square([0, 3, 6]), 16)
    undefined = {name for name, value in found.items() if value is None}
    assert undefined == {name for name in found if name.startswith(("drift", "spectral"))} | {"seam"}


# ----------------------------------------------------------------------------------------------------------------- seam


def test_chunk_starts():
    assert chunk_starts(40, (9, 12)).tolist() == [9, 21, 33] and chunk_starts(36, 12).tolist() == [12, 24]
    assert chunk_starts(9, (9, 12)).tolist() == []


def test_cuts_at_chunk_borders_are_seams():
    levels = np.arange(45) % 2
    levels[9:] += 30
    levels[21:] += 30
    levels[33:] += 30
    cut = flat(levels)
    assert video_metrics(cut, 16, (9, 12))["seam"] == pytest.approx(30, rel=0.1)
    assert video_metrics(cut, 16, 12)["seam"] < 0.5  # the cuts are elsewhere
    even = video_metrics(flat(np.arange(45) % 2), 16, (9, 12))["seam"]
    assert even == pytest.approx(1) and video_metrics(cut, 16)["seam"] is None
    assert seam_score(np.ones(8) / 255, 9) is None and seam_score(np.ones(8) / 255, 1) is None


# -------------------------------------------------------------------------------------------------------------- spectra


def test_white_noise_has_its_variance_at_every_frequency():
    frames = noise(160).copy()
    frames[..., 1:] = frames[..., :1]  # gray, so that luma has the pixels' own variance
    found = spectra(frames)
    variance = 10 * np.log10((256**2 - 1) / 12 / 255**2)
    np.testing.assert_allclose(found.spatial, variance, atol=0.3)  # dB: 160 · 12 to 400 values a ring
    # cells of 4×4 pixels; taking the mean away costs the lowest frequency a little
    np.testing.assert_allclose(found.temporal[1:], variance - 10 * np.log10(16), atol=0.3)
    still = spectra(np.repeat(frames[:1], 32, 0))
    np.testing.assert_allclose(still.temporal, 10 * np.log10(FLOOR))


def test_order_of_frames_is_heard_in_time_alone(clip):
    shuffled = clip[np.random.default_rng(0).permutation(len(clip))]
    distance = spectral_distance([spectra(shuffled)], [spectra(clip)])
    assert distance["spectral_distance_spatial"] < 1e-6
    assert distance["spectral_distance_temporal"] > 3


def test_look_is_heard_in_space():
    still = [np.repeat(texture(64, 64, seed)[None], 32, 0) for seed in (0, 1)]
    blurred = (still[0].astype(int) + np.roll(still[0], 1, 1) + np.roll(still[0], 1, 2)) // 3
    near = spectral_distance([spectra(still[1])], [spectra(still[0])])
    far = spectral_distance([spectra(blurred.astype(np.uint8))], [spectra(still[0])])
    assert near["spectral_distance_spatial"] < far["spectral_distance_spatial"] / 3
    assert far["spectral_distance_temporal"] < 1e-6


def test_spectra_drift_when_a_stream_stops_moving():
    ball = render(PROMPTS[1], 128, seed=1)[:, ::2, ::2]
    stuck = np.concatenate([ball[:80], np.repeat(ball[80:81], 80, 0)])
    moving, stopped = video_metrics(ball, 16), video_metrics(stuck, 16)
    assert stopped["spectral_drift_temporal"] > 10 > 3 * moving["spectral_drift_temporal"]


def test_cells_average_what_they_cover():
    weights = area_weights(10, 4)
    np.testing.assert_allclose(weights[0], [0.4, 0.4, 0.2, 0, 0, 0, 0, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(area_weights(64, 64), np.eye(64))
    np.testing.assert_allclose(area_weights(30, 64).sum(1), 1, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- Fréchet and features


def test_frechet_distance_is_its_formula():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 6))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a + 2, a) == pytest.approx(6 * 4, rel=1e-6)
    assert frechet_distance(3 * a, a) == pytest.approx(np.sum((2 * a.mean(0)) ** 2) + 4 * np.cov(a.T).trace(), rel=1e-6)
    one = rng.normal(size=(50, 1))
    assert frechet_distance(one + 1, one) == pytest.approx(1)
    mix = rng.normal(size=(6, 6))
    b = rng.normal(size=(300, 6)) @ mix
    product = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.cov(a.T).trace() + np.cov(b.T).trace()
    assert frechet_distance(a, b) == pytest.approx(expected - 2 * np.sqrt(product.real).sum(), rel=1e-6)


def test_noise_is_farther_than_another_clip(clip):
    others = [render(prompt, 33, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    space = VAEFeatures()
    near = compare_videos((c for c in others), [clip], features=space)
    far = compare_videos([noise(size=128, seed=s) for s in (0, 1)], [clip], features=space)
    assert len(near) == 3 and all(near[name] < far[name] / 2 for name in near)
    same = compare_videos(iter(others), others, features=space)
    assert all(value == pytest.approx(0, abs=1e-4) for value in same.values())


def test_vae_features_stream(clip):
    space = VAEFeatures()
    whole = space(clip)
    assert whole.shape == (12, 48)  # 49 = 1 + 12 · 4 frames, the first latent left out
    state, rows = None, []
    with torch.inference_mode():
        pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] / 127.5 - 1
        for part in (pixels[:, :, :9], pixels[:, :, 9:]):
            latents, state = space.vae.encode(part, state)
            rows.append(latents.mean((3, 4))[0].T)
    np.testing.assert_allclose(whole[:, :24], torch.cat(rows)[1:].numpy(), atol=1e-4)
    assert space(clip[:3, :40, :50]).shape == (1, 48)  # any size, and too short for a second latent


MODULE = """
import torch
class Means(torch.nn.Module):
    def forward(self, x):
        return x.mean((3, 4))[0].T.contiguous()
make, ready, number = Means, Means(), 3
class Wrong(Means):
    def forward(self, x):
        return x
"""


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_features_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    frames = noise(40, 16)
    expected = frames[:32].astype(np.float64).mean((1, 2)) / 127.5 - 1  # whole runs of 16 frames
    made = load_features("my_features:make")
    torch.jit.trace(made.module, torch.zeros(1, 3, 16, 16, 16)).save(str(tmp_path / "means.pt"))
    for name in ("my_features:make", "my_features:ready", str(tmp_path / "means.pt")):
        np.testing.assert_allclose(load_features(name)(frames), expected, atol=1e-5)
    assert made(frames[:5]).shape == (5, 3)  # shorter than a run
    (tmp_path / "torn.pt").write_bytes(b"PK not really")
    wrong = ["nothing", "my_features:none", "no_such_module:x", ".x:y", "my_features:number", str(tmp_path / "torn.pt")]
    for name in wrong:
        with pytest.raises(InputError, match="features") as caught:
            load_features(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"returned \[1, 3, 16"):
        load_features("my_features:Wrong")(frames)


# ---------------------------------------------------------------------------------------------- length, parts and files


def test_a_clip_played_twice_scores_as_once():
    there = render(PROMPTS[0], 60, seed=3)[:, ::2, ::2]
    loop = np.concatenate([there, there[::-1]])  # back at its start without a jump
    once, twice = video_metrics(loop, 8), video_metrics(np.concatenate([loop, loop]), 8)
    for name in ("flicker", "frame_difference", "warping_error", "warping_consistency", "dynamic_degree"):
        assert twice[name] == pytest.approx(once[name], rel=0.05), name
    assert twice["stagnation"] == pytest.approx(once["stagnation"], abs=0.01)
    found = spectral_distance([spectra(np.concatenate([loop, loop]))], [spectra(loop)])
    assert found["spectral_distance_spatial"] < 1e-6 and found["spectral_distance_temporal"] < 0.5


def test_parts_of_any_size_give_the_same_numbers(clip, monkeypatch):
    small = np.concatenate([clip, clip])[:, ::2, ::2]
    whole = video_metrics(small, 8, (9, 12))
    meter = VideoMeter(8, (9, 12))
    for first, last in ((0, 1), (1, 2), (2, 20), (20, 20), (20, 21), (21, 98)):
        meter.add(small[first:last])
    monkeypatch.setattr("streamgen.evaluation.video_frames.PART_PIXELS", 5 * 64 * 64)
    assert meter.metrics() == pytest.approx(whole) == video_metrics(small, 8, (9, 12))
    assert None not in whole.values() and meter.frames == 98


def test_files_are_measured_as_their_frames(tmp_path):
    frames = square(range(0, 66, 2))
    with open_sink(tmp_path / "clip.mp4", fps=12) as sink:
        sink.write(frames)
    with open_sink(tmp_path / "folder") as sink:
        sink.write(frames)
    assert file_metrics(tmp_path / "clip.mp4", 3) == pytest.approx(
        video_metrics(read_video(tmp_path / "clip.mp4"), 12, 3)
    )
    assert file_metrics(tmp_path / "folder", fps=12) == pytest.approx(video_metrics(frames, 12))
    with pytest.raises(InputError, match="give fps"):
        file_metrics(tmp_path / "folder")
    (tmp_path / "folder" / "frame_000020.png").write_bytes(b"torn")
    with pytest.raises(InputError, match="damaged"):
        file_metrics(tmp_path / "folder", fps=12)
    (tmp_path / "broken.mp4").write_bytes(b"\x00" * 5000)
    for name in ("broken.mp4", "absent.mp4"):
        with pytest.raises(InputError, match="cannot read") as caught:
            file_metrics(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("frames", "fps", "chunks", "message"),
    [
        (np.zeros((4, 16, 16, 3), np.float32), 16, None, r"not float32 \[4, 16, 16, 3\]"),
        (np.zeros((4, 3, 16, 16), np.uint8), 16, None, "uint8 array"),
        ([1, 2], 16, None, "not list"),
        (np.zeros((4, 16, 7, 3), np.uint8), 16, None, "16×7"),
        (np.zeros((1, 16, 16, 3), np.uint8), 16, None, "at least 2"),
        (np.zeros((0, 16, 16, 3), np.uint8), 16, None, "at least 2"),
        (np.zeros((4, 16, 16, 3), np.uint8), 0, None, "positive rate"),
        (np.zeros((4, 16, 16, 3), np.uint8), float("nan"), None, "positive rate"),
        (np.zeros((4, 16, 16, 3), np.uint8), 16, 0, "chunks of 0"),
        (np.zeros((4, 16, 16, 3), np.uint8), 16, (9, 1.5), "positive integer"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(frames, fps, chunks, message):
    with pytest.raises(InputError, match=message) as caught:
        video_metrics(frames, fps, chunks)
    assert "\n" not in str(caught.value)


def test_sizes_and_empty_sets_are_refused():
    meter = VideoMeter(16)
    meter.add(flat([1, 2]))
    with pytest.raises(InputError, match="one size"):
        meter.add(noise(2, 32))
    with pytest.raises(InputError, match="0 clips and 1 references"):
        compare_videos([], [noise(2, 16)], features=lambda frames: frames.mean((1, 2)))
    with pytest.raises(InputError, match="1 and 5 feature vectors"):
        frechet_distance(np.ones((1, 2)), np.ones((5, 2)))
    with pytest.raises(InputError, match="shapes"):
        frechet_distance(np.ones((4, 2)), np.ones((5, 3)))
