"""The page of `streamgen demo`: a prompt, Start, Apply, Stop, and the stream itself, live.

    streamgen demo --port 7860

Gradio draws the controls. The picture is a small page of our own (view.html) in a frame: it takes JPEGs by short
requests and shows them at the pace of the content. That needs neither ffmpeg nor ffprobe, a tab that does not ask gets
nothing, and no connection stays open: browsers allow six to one server, in all tabs together.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

from streamgen.demos.live import LiveStreams
from streamgen.errors import InputError

EXAMPLE = "a red circle bouncing on a navy background"
MOST = 8  # frames per answer
FRAME = "width:100%; height:min(36rem,65vh); border:0"
ENDED = "this stream has ended: press Start for a new one"
POLICY = (  # nothing is fetched from another host, whatever the installed gradio would like to add
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    b"connect-src 'self' data: blob:; frame-ancestors 'self'"
)


class OwnHostOnly:
    """ASGI middleware: browsers fetch from this server alone."""

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_policy(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def build_app(streams: LiveStreams, advise: Callable[[str], str | None] = lambda prompt: None) -> FastAPI:
    """The web application: the page at `/`, its picture at `/view/KEY`, numbers at `/status`.

    Args:
        advise: what the user should know about a prompt; None = nothing.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # its documentation loads scripts from elsewhere
    app.add_middleware(OwnHostOnly)
    view = Path(__file__).with_name("view.html").read_text(encoding="utf-8")

    @app.get("/status")
    def status():
        return JSONResponse(streams.status())

    @app.get("/view/{key}")
    def show(key: str):
        return HTMLResponse(view)

    @app.post("/live/{key}")
    def take(key: str, most: int = MOST):
        return JSONResponse(answer(streams, key, min(max(most, 1), MOST)))

    @app.post("/live/{key}/end")
    def end(key: str):
        stream = streams.find(key)
        if stream is not None:
            stream.stop()
        return JSONResponse({})

    with redirect_stdout(io.StringIO()):  # gradio 5 prints the path; stdout is for the address alone
        return gr.mount_gradio_app(app, build_page(streams, advise), path="/", ssr_mode=False, max_file_size=1)


def answer(streams: LiveStreams, key: str, most: int) -> dict:
    """What the picture's page asks for again and again: the next frames, and how the stream is."""
    stream = streams.find(key)
    if stream is None:
        return {"frames": [], "fps": streams.fps, "first_frame": None, "over": True, "message": ENDED}
    frames = [
        {"jpeg": base64.b64encode(frame.jpeg).decode(), "chunk": frame.chunk, "prompt": frame.prompt}
        for frame in stream.take(most)
    ]
    over = stream.over
    message = (stream.error or ENDED) if over else ""
    return {"frames": frames, "fps": streams.fps, "first_frame": stream.first_frame, "over": over, "message": message}


def build_page(streams: LiveStreams, advise: Callable[[str], str | None]) -> gr.Blocks:
    """Controls and their callbacks. A tab is known by gradio's session hash; tensors stay in `streams`."""

    def start(prompt: str, request: gr.Request):
        try:
            stream = streams.start(request.session_hash, prompt)
        except InputError as error:
            return str(error), gr.skip()
        frame = f'<iframe src="view/{stream.key}" title="the stream" style="{FRAME}"></iframe>'
        return advise(prompt) or f"stream {stream.number}: {prompt}", frame

    def apply(prompt: str, request: gr.Request):
        try:
            change = streams.apply(request.session_hash, prompt)
        except InputError as error:
            return str(error)
        return advise(prompt) or f"from chunk {change.chunk} on: {prompt}"

    def stop(request: gr.Request):
        return ("stopped" if streams.stop(request.session_hash) else "nothing is playing here"), ""

    with gr.Blocks(title="streamgen", analytics_enabled=False) as page:
        prompt = gr.Textbox(EXAMPLE, label="Prompt (Enter applies it)", lines=1, max_lines=1, elem_id="prompt")
        with gr.Row():
            begin = gr.Button("Start", variant="primary", elem_id="start")
            change = gr.Button("Apply", elem_id="apply")
            end = gr.Button("Stop", elem_id="stop")
        said = gr.Textbox(label="Status", interactive=False, lines=1, elem_id="said")
        picture = gr.HTML(elem_id="picture", padding=False)
        # past gradio's queue: Apply must not wait behind anything
        quick = dict(queue=False, show_progress="hidden")
        begin.click(start, prompt, [said, picture], **quick)
        change.click(apply, prompt, said, **quick)
        prompt.submit(apply, prompt, said, **quick)
        end.click(stop, None, [said, picture], **quick)
    return page
