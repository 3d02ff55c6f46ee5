"""The doing of `streamgen render`: one clip after the other, each finished for good when its record is written."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from streamgen.cli import records
from streamgen.cli.jobs import Clip, Setup, check_places
from streamgen.cli.loading import load_pipeline
from streamgen.cli.records import Source
from streamgen.errors import BrokenStreamError, InputError

log = logging.getLogger(__name__)


@contextmanager
def progress(frames: int, quiet: bool) -> Iterator[Any]:
    """One bar for everything there is to do, with the time left; logs appear above it."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    bar = tqdm(
        total=frames, unit="frame", file=sys.stderr, delay=1, disable=quiet, leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True,
    )  # fmt: skip
    with bar, logging_redirect_tqdm([logging.getLogger("streamgen")]):
        yield bar


def _name(clip: Clip, bar: Any) -> None:
    """A clip that is there, on stdout; on a terminal the bar steps aside."""
    if clip.target != "-":
        if sys.stdout.isatty():
            bar.write(clip.target, file=sys.stdout)
        else:
            print(clip.target, flush=True)


class Take:
    """A clip on its way: frames go to its sink until it is full; the rest is kept for whoever continues the stream."""

    def __init__(self, clip: Clip, fps: float, sink) -> None:
        self.clip, self.fps, self.sink = clip, fps, sink
        self.digest = hashlib.sha256()
        self.size = (0, 0)  # (width, height)
        self.surplus: np.ndarray | None = None

    def write(self, frames: np.ndarray) -> int:
        """Take what fits of uint8 frames [f, H, W, 3]; how many that were."""
        if not self.sink.frames:
            self._begin(frames)
        left = self.clip.num_frames - self.sink.frames
        mine, self.surplus = np.ascontiguousarray(frames[:left]), frames[left:]
        self.sink.write(mine)
        self.digest.update(mine)
        return len(mine)

    def _begin(self, frames: np.ndarray) -> None:
        self.size = frames.shape[2], frames.shape[1]
        if self.clip.target == "-":
            size = "x".join(map(str, self.size))
            reader = f"ffmpeg -f rawvideo -pix_fmt rgb24 -s {size} -framerate {self.fps:g} -i - clip.mp4"
            log.info("raw rgb24 frames on stdout, to be read for example by: %s", reader)
        else:  # from here on an older clip of that name is gone, and with it what said that it was finished
            records.record_path(self.clip.target).unlink(missing_ok=True)

    def play(self, session, pending: list, surplus: np.ndarray | None, bar) -> None:
        """Fill the clip; a prompt of `pending` takes effect with the first chunk at or after its frame."""
        if surplus is not None and len(surplus):
            bar.update(self.write(surplus))
        while self.sink.frames < self.clip.num_frames:
            while pending and pending[0].frame <= self.sink.frames:
                entry = pending.pop(0)
                session.set_prompt(entry.prompt, entry.mode, entry.blend)
            chunk = session.next()
            bar.update(self.write(chunk.frames))
            log.debug("chunk %d: %s", chunk.index, {name: round(value, 3) for name, value in chunk.timings.items()})


class Render:
    """All clips of a command.

    Args:
        args: the options --overwrite, --save-state and those of loading and talking.
        folder: below it the clips' folders are made; None = a single file.
        several: what is there already stays, unless --overwrite; a single clip is always rendered.
    """

    def __init__(
        self, args: argparse.Namespace, source: Source, setup: Setup, clips: Sequence[Clip], folder: Path | None,
        several: bool,
    ) -> None:  # fmt: skip
        self.args, self.source, self.setup = args, source, setup
        self.clips, self.folder, self.several = clips, folder, several
        self.replacing = several or args.overwrite
        self.done = 0
        self.size: tuple[int, ...] = ()  # (height, width)
        self.take: Take | None = None

    def run(self) -> int:
        """Render what is not there yet. Returns the exit code."""
        from streamgen.media import MediaError

        todo = {clip.target for clip in self.clips if not self._there(clip)}
        self.done = len(self.clips) - len(todo)
        if self.done:
            log.info("%d of %d already there (--overwrite renders them again)", self.done, len(self.clips))
        work = [clip for clip in self.clips if clip.target in todo]
        if todo != {"-"}:
            check_places(work, self.folder, self.replacing)
        pipe = self._load() if todo else None
        if pipe is not None and self.source.state is None:  # snapped to the grid, and said so, once
            sides = pipe.latent_size(self.setup.height, self.setup.width)
            self.size = tuple(side * pipe.codec.spatial_ratio for side in sides)
        try:
            with progress(sum(clip.num_frames for clip in work), self.args.quiet) as bar:
                for clip in self.clips:
                    if clip.target in todo:
                        self._clip(pipe, clip, bar)
                        self.done += 1
                    _name(clip, bar)
        except KeyboardInterrupt:
            return self._interrupted()
        except (MediaError, BrokenStreamError) as error:
            raise type(error)(f"{error}{self._rest()}") from error
        return 0

    # ------------------------------------------------------------------------------------------- before
    def _there(self, clip: Clip) -> bool:
        """Whether a clip need not be rendered. Raises InputError where a finished clip of other settings would go."""
        if clip.target == "-":
            return False
        apart = records.finished(clip.target, self.setup.settings(clip), self.args.save_state is not None)
        if not self.several or self.args.overwrite or apart is None:
            return False
        if apart:
            what = f"{clip.target} is there with other settings ({', '.join(apart)})"
            raise InputError(f"{what}: give another --output, or --overwrite to lose what is there")
        return True

    def _load(self):
        setup, known = self.setup, bool(self.source.path)  # then the configuration is older than this command
        names = "model checkpoint device dtype threads lora lora_2 codec tile".split()
        chosen = {name: getattr(setup, name) for name in names}
        preset, overrides = (None, []) if known else (setup.preset, setup.overrides)
        pipe = load_pipeline(argparse.Namespace(**{**vars(self.args), **chosen, "preset": preset}), overrides)
        pipe.stream_config = setup.config
        return pipe

    # ------------------------------------------------------------------------------------------- a clip
    def _clip(self, pipe, clip: Clip, bar) -> None:
        if self.several:
            bar.set_description(f"clip {self.done + 1} of {len(self.clips)}")
        begin = time.perf_counter()
        self.take = take = Take(clip, self.setup.fps, self._sink(clip))
        fresh = self.source.state is None
        surplus = None if self.source.surplus is None else self.source.surplus.cpu().numpy()
        with take.sink, self._session(pipe, clip) as session:
            first = session.delivered - (0 if surplus is None else len(surplus))
            take.play(session, list(clip.entries[1 if fresh else 0 :]), surplus, bar)
            take.sink.close()
            seconds = time.perf_counter() - begin
            state = self._save_state(session, take)
        self._report(take, seconds)
        if clip.target != "-":
            self._record(take, first, seconds, state)
        self.take = None

    def _sink(self, clip: Clip):
        from streamgen.media import RawSink, open_sink

        if clip.target == "-":
            sys.stdout.flush()
            return RawSink(sys.stdout.buffer)
        Path(clip.target).parent.mkdir(parents=True, exist_ok=True)
        return open_sink(clip.target, self.setup.fps, replace=self.replacing)  # which begins with the first frame

    def _session(self, pipe, clip: Clip):
        if self.source.state is not None:
            return pipe.resume(self.source.state)
        length = None if self.setup.endless else clip.num_frames
        return pipe.stream(
            clip.entries[0].prompt, clip.negative_prompt, *self.size, length, seed=clip.seed, image=self._image()
        )

    def _image(self):
        """The picture an image-to-video stream begins with."""
        if self.setup.image is None:
            return None
        from PIL import Image, UnidentifiedImageError

        try:
            return Image.open(self.setup.image).convert("RGB")
        except (UnidentifiedImageError, OSError):
            raise InputError(f"--image {self.setup.image} is no picture that can be read") from None

    def _save_state(self, session, take: Take) -> Path | None:
        """The stream after the clip, with the frames that were computed beyond its end."""
        import torch

        if self.args.save_state is None:
            return None
        path = Path(self.args.save_state) if self.args.save_state else records.state_path(take.clip.target)
        settings = {**self.setup.settings(take.clip), "endless": True}
        own = {"settings": settings, "sha256": take.digest.hexdigest(), "surplus": torch.tensor(take.surplus)}
        records.write_state(path, {**session.state_dict(), "render": own})
        return path

    def _record(self, take: Take, first: int, seconds: float, state: Path | None) -> None:
        settings, place = self.setup.settings(take.clip), records.record_path(take.clip.target)
        result: dict[str, Any] = {
            "clip": Path(take.clip.target).name, "first_frame": first, "frames": take.sink.frames,
            "width": take.size[0], "height": take.size[1], "sha256": take.digest.hexdigest(),
            "seconds": round(seconds, 3), "frames_per_second": round(take.sink.frames / seconds, 2),
            "state": state and os.path.relpath(state, place.parent),
        }  # fmt: skip
        records.write_record(take.clip.target, settings, result)
        old = self.source.record
        if old is None or records.differences(old["settings"], settings):
            return
        if old["result"].get("sha256") == result["sha256"]:
            log.info("the frames are those of %s, bit by bit", self.source.path)
        else:
            log.warning("the frames are not those of %s: compare `made_with` in the two records", self.source.path)

    # ------------------------------------------------------------------------------------------- what is said
    def _report(self, take: Take, seconds: float) -> None:
        size, rate = "×".join(map(str, take.size)), take.sink.frames / seconds
        name = f"{take.clip.target}: " if self.several else ""
        text = "%s%d frames of %s in %.1f s: %.1f fps, %.1f× real time"
        log.info(text, name, take.sink.frames, size, seconds, rate, rate / self.setup.fps)

    def _rest(self) -> str:
        """How much of a batch is done."""
        if not self.several:
            return ""
        return f"; {self.done} of {len(self.clips)} clips are finished, the same command renders the rest"

    def _interrupted(self) -> int:
        kept = self.take.sink.frames if self.take else 0
        if not kept and not self.done:
            raise KeyboardInterrupt
        parts = []
        if kept:
            target, frames = self.take.clip.target, self.take.clip.num_frames
            name, end = ("stdout", "") if target == "-" else (target, " and plays")
            parts.append(f"{name} keeps the first {kept} of {frames} frames{end}")
        log.error("interrupted: %s", "; ".join(filter(None, [*parts, self._rest().removeprefix("; ")])))
        return 130
