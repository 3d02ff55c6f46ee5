"""`streamgen demo`: a page in the browser, on this machine alone unless --host says otherwise.

    streamgen demo --port 7860 --max-streams 4 cache.window=9
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import socket
from collections.abc import Sequence
from importlib.util import find_spec

from streamgen.cli.console import talking
from streamgen.cli.loading import add_parts, load_pipeline
from streamgen.cli.parsing import Parser, check_overrides, whole
from streamgen.errors import InputError, UnavailableError

log = logging.getLogger(__name__)


def parser(prog: str, description: str) -> Parser:
    out = Parser(prog, description)
    out.add_argument("--model", default="sprites", help="an embedded model's name or a diffusers folder (sprites)")
    out.add_argument("--checkpoint", metavar="FILE", help=".pt or .safetensors whose transformer replaces the model's")
    out.add_argument("--preset", metavar="NAME", help="see `streamgen presets`; if not given, the model's own")
    out.add_argument("--height", type=whole(1), metavar="PIXELS", help="snapped to the model's grid")
    out.add_argument("--width", type=whole(1), metavar="PIXELS")
    out.add_argument("--seed", type=whole(), default=0)
    out.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cpu, cuda, cuda:N, mps")
    out.add_argument("--dtype", help="bf16, fp16 or fp32; if not given, bf16 where it is fast, else fp32")
    out.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads")
    out.add_argument("--host", default="127.0.0.1", help="0.0.0.0 = whoever reaches this machine (127.0.0.1)")
    out.add_argument("--port", type=whole(0), default=7860, metavar="N", help="0 = a free one (7860)")
    out.add_argument("--max-streams", type=whole(1), default=4, metavar="N", help="tabs that may play at once (4)")
    add_parts(out)
    out.add_talk()
    out.add_overrides()
    return out


def run(args: argparse.Namespace) -> int:
    overrides = check_overrides(args.overrides, "settings are KEY=VALUE, e.g. cache.window=9")
    if find_spec("gradio") is None:
        from streamgen.cli.doctor import pip_line

        raise UnavailableError(f"the page needs gradio, which is not installed: {pip_line('demo')}")
    with talking(args.quiet, args.verbose), listen(args.host, args.port) as listener:
        return _serve(args, overrides, listener)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on. Raises InputError for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot listen on {host}, port {port}: {reason}; choose another --port (0 = a free one) or --host"
        ) from None


def _serve(args: argparse.Namespace, overrides: Sequence[str], listener: socket.socket) -> int:
    pipe = load_pipeline(args, overrides)

    import uvicorn

    from streamgen.demos.live import LiveStreams
    from streamgen.demos.page import EXAMPLE, build_app

    options = {"height": args.height, "width": args.width, "seed": args.seed}
    with pipe.stream(EXAMPLE, **options) as stream:
        stream.next()  # settings that cannot stream are refused here, and the first visitor meets a warm model
    streams = LiveStreams(pipe, args.max_streams, **options)
    app = build_app(streams, _outside_its_world if args.model == "sprites" else lambda prompt: None)
    if not _is_loopback(args.host):
        log.warning("--host %s: whoever reaches this machine can use the page, no password is asked for", args.host)
    level = "info" if args.verbose else "warning"
    server = uvicorn.Server(uvicorn.Config(app, log_level=level, timeout_graceful_shutdown=2))
    print(_address(args.host, listener.getsockname()[1]), flush=True)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        return 130
    finally:
        streams.close()
    return 0


def _outside_its_world(prompt: str) -> str | None:
    """The embedded model knows one small world; other prompts play, and the user knows why they look odd."""
    from streamgen.worlds.sprites import parse

    try:
        parse(prompt)
    except InputError as error:
        return f"playing, but the embedded model was not trained on this prompt: {error}"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(host: str, port: int) -> str:
    """What to type into a browser on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
