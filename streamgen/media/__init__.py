"""Frames in and out of files, a chunk at a time, and a clock for showing them.

The idea: a video is written while it is generated, so that its length costs no memory (ffmpeg's index apart: about 100
bytes a frame, 6 MB an hour) and whatever ends the process leaves a file that plays. Encoding happens in a child
process, ffmpeg, that reads raw frames from a pipe; it runs in a session of its own, so Ctrl-C does not reach it, and
when our end of the pipe goes away, for whatever reason, it finishes the file. An mp4 is written in fragments of a
second, so that even ffmpeg's own death costs only the last few.

    with open_sink("story.mp4", fps=16) as sink:
        for chunk in stream:
            sink.write(chunk.frames)        # uint8 [f, H, W, 3]
"""

from __future__ import annotations

from streamgen.media.images import contact_sheet, save_image
from streamgen.media.pacing import Pacer
from streamgen.media.paths import MediaError, check_folder, check_output
from streamgen.media.reading import VideoInfo, iter_video, read_video, video_info
from streamgen.media.video import FfmpegSink, FolderSink, RawSink, VideoSink, open_sink

__all__ = [
    "FfmpegSink", "FolderSink", "MediaError", "Pacer", "RawSink", "VideoInfo", "VideoSink", "check_folder",
    "check_output", "contact_sheet", "iter_video", "open_sink", "read_video", "save_image", "video_info",
]  # fmt: skip
