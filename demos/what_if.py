"""One past, two futures: fork a running stream and give each branch its own prompt.

    python -m streamgen.demos.what_if -o what-if.mp4
"""

from __future__ import annotations

import argparse

import numpy as np

import streamgen
from streamgen.media import open_sink


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", default="a red circle bouncing on a navy background")
    parser.add_argument("--left", default="a yellow circle bouncing on a navy background")
    parser.add_argument("--right", default="a red circle bouncing on a forest background")
    parser.add_argument("--chunks", type=int, default=4, help="before and after the fork (4)")
    parser.add_argument("-o", "--output", default="what-if.mp4")
    args = parser.parse_args()
    if args.chunks < 1:
        parser.error("--chunks: give 1 or more")

    pipe = streamgen.load("sprites")
    with pipe.stream(args.prompt, seed=0) as stream, open_sink(args.output, fps=pipe.settings.fps) as sink:
        for _ in range(args.chunks):
            frames = stream.next().frames
            sink.write(np.concatenate([frames, frames], 2))
        other = stream.fork()
        stream.set_prompt(args.left)
        other.set_prompt(args.right)
        for _ in range(args.chunks):
            sink.write(np.concatenate([stream.next().frames, other.next().frames], 2))
    print(args.output)


if __name__ == "__main__":
    main()
