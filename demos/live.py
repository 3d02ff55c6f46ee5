"""Streams that play: a thread each computes chunks, whoever shows the picture takes frames.

    streams = LiveStreams(streamgen.load("sprites"), limit=4)
    stream = streams.start("somebody", "a red circle bouncing on a navy background")
    frames = stream.take(4)
    streams.apply("somebody", "a green circle bouncing on a navy background")

Taking sets the pace. A chunk is begun when at most half a chunk waits, so a new prompt is seen within about two chunks;
a stream that nobody reads keeps a chunk and a half, computes nothing more, and ends after a while.
"""

from __future__ import annotations

import io
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
from PIL import Image

from streamgen.errors import InputError
from streamgen.session import Change, Chunk, StreamSession

log = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds without a reader after which a stream ends: its cache is memory that others need


@dataclass(frozen=True)
class Frame:
    """One picture as JPEG, with the index and the prompt of its chunk."""

    jpeg: bytes
    chunk: int
    prompt: str


def to_jpeg(picture: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> a JPEG file with colour at full resolution, so that small saturated shapes stay sharp."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90, subsampling=0)
    return file.getvalue()


class LiveStream:
    """A session that plays in a thread of its own.

    Args:
        owner: who started it; one owner has one stream.
        number: counts the streams of this process, for people; `key` is the secret by which it is read.
        model: held while a chunk is computed, so that streams of one model take turns.
        asked: `time.perf_counter()` of the request that `first_frame` is measured from.
        on_end: called from the thread when the session is closed.
    """

    def __init__(
        self,
        owner: str,
        number: int,
        session: StreamSession,
        model: threading.Lock,
        asked: float,
        patience: float,
        on_end: Callable[[LiveStream], None],
    ) -> None:
        self.owner, self.number, self.key = owner, number, secrets.token_urlsafe(16)
        self.session, self.error = session, None  # error: one line for the viewer; None = all is well
        self.first_frame: float | None = None  # seconds from the request until the first frames left
        self.chunks = 0  # computed so far
        self.stopping = False
        self._model, self._asked, self._patience, self._on_end = model, asked, patience, on_end
        self._frames: deque[Frame] = deque()
        self._enough = 0  # no chunk is begun while more frames than this wait: half of the last chunk
        self._ended = False
        self._changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name=f"stream-{number}", daemon=True)

    # ------------------------------------------------------------------------------------------- for readers
    @property
    def waiting(self) -> int:
        """Frames that are ready."""
        return len(self._frames)

    @property
    def over(self) -> bool:
        """Nothing will come any more; `error` says why, if something went wrong."""
        return self.stopping or (self._ended and not self._frames)

    def take(self, most: int, timeout: float = 1.0) -> list[Frame]:
        """Up to `most` frames, oldest first; none if none came within `timeout` seconds or the stream is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self._ended or self.stopping, timeout)
            taken = [self._frames.popleft() for _ in range(min(most, len(self._frames)))]
            self._changed.notify_all()
        if taken and self.first_frame is None:
            self.first_frame = time.perf_counter() - self._asked
        return taken

    def stop(self) -> None:
        """Ask the thread to end; a chunk that has begun is finished first, and thrown away."""
        with self._changed:
            self.stopping = True
            self._frames.clear()
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------- in the thread
    def _run(self) -> None:
        try:
            with self.session:
                while self._room():
                    with self._model:
                        chunk = None if self.stopping else self.session.next()
                    if chunk is not None:
                        self._put(chunk)
        except StopIteration:
            pass
        except InputError as error:
            self.error = str(error)
        except Exception as error:
            log.exception("stream %d failed", self.number)
            reason = str(error).strip().partition("\n")[0]
            self.error = f"the model failed: {type(error).__name__}{reason and f': {reason}'}"
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            self._on_end(self)

    def _room(self) -> bool:
        """Wait until the next chunk is wanted; False = no chunk is wanted any more."""
        with self._changed:
            wanted = self._changed.wait_for(lambda: self.stopping or self.waiting <= self._enough, self._patience)
        if not wanted:
            raise InputError(f"nobody watched for {self._patience:g} s, so the stream ended: press Start for a new one")
        return not self.stopping

    def _put(self, chunk: Chunk) -> None:
        frames = [Frame(to_jpeg(picture), chunk.index, chunk.prompt) for picture in chunk.frames]
        with self._changed:
            self.chunks += 1
            self._enough = len(frames) // 2
            if not self.stopping:
                self._frames.extend(frames)
            self._changed.notify_all()


class LiveStreams:
    """The streams of one pipeline, one per owner and `limit` in all.

    Args:
        limit: streams that may play at once; each holds a cache.
        patience: seconds after which a stream without a reader ends.
        options: of `pipe.stream`, the same for every stream.
    """

    def __init__(self, pipe, limit: int = 4, patience: float = PATIENCE, **options) -> None:
        self.pipe, self.limit = pipe, limit
        self._patience, self._options = patience, options
        self._model, self._starting, self._lock = threading.Lock(), threading.Lock(), threading.Lock()
        self._numbers = count(1)
        self._live: dict[str, LiveStream] = {}  # by key, until the thread has closed the session
        self._failed: deque[LiveStream] = deque(maxlen=limit)  # the reason may be asked for after the end

    @property
    def fps(self) -> float:
        """Frames per second of content."""
        return self.pipe.settings.fps

    def start(self, owner: str, prompt: str) -> LiveStream:
        """A new stream in place of the owner's old one. Raises InputError: empty prompt, too many streams."""
        asked = time.perf_counter()
        if not prompt.strip():
            raise InputError("the prompt is empty: say what to show")
        with self._starting:
            if sum(stream.owner != owner for stream in self._playing()) >= self.limit:
                raise InputError(
                    f"{self.limit} streams are playing, as many as this page allows: stop one, "
                    f"or start the page with --max-streams {self.limit + 1}"
                )
            self.stop(owner)
            with self._model:
                session = self.pipe.stream(prompt, **self._options)
            stream = LiveStream(
                owner, next(self._numbers), session, self._model, asked, self._patience, on_end=self._forget
            )
            with self._lock:
                self._live[stream.key] = stream
            stream.thread.start()
        return stream

    def apply(self, owner: str, prompt: str) -> Change:
        """A new prompt for the owner's stream, from the next chunk on. Raises InputError: no stream, empty prompt."""
        for stream in self._playing():
            if stream.owner == owner:
                return stream.session.set_prompt(prompt)
        raise InputError("nothing is playing here: press Start")

    def stop(self, owner: str) -> bool:
        """End the owner's stream; False if there is none."""
        mine = [stream for stream in self._playing() if stream.owner == owner]
        for stream in mine:
            stream.stop()
        return bool(mine)

    def find(self, key: str) -> LiveStream | None:
        """The stream of a key, also one that failed not long ago."""
        with self._lock:
            known = [*self._live.values(), *self._failed]
        return next((stream for stream in known if stream.key == key), None)

    def status(self) -> dict:
        """Plain numbers, for `GET /status`: a key would let its reader take another one's frames."""
        with self._lock:
            live = list(self._live.values())
        streams = [{"number": s.number, "chunks": s.chunks, "waiting": s.waiting} for s in live]
        return {"max_streams": self.limit, "streams": streams}

    def close(self, timeout: float = 10.0) -> None:
        """End all streams; returns when their threads have, or after `timeout` seconds each."""
        with self._lock:
            live = list(self._live.values())
        for stream in live:
            stream.stop()
        for stream in live:
            stream.thread.join(timeout)

    def _playing(self) -> list[LiveStream]:
        with self._lock:
            return [stream for stream in self._live.values() if not stream.stopping]

    def _forget(self, stream: LiveStream) -> None:
        with self._lock:
            del self._live[stream.key]
            if stream.error is not None:
                self._failed.append(stream)
