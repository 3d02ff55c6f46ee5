"""The page: streams that play side by side and end when nobody watches; the real server seen through a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from streamgen.cli import main
from streamgen.cli.demo import parser
from streamgen.config import load_preset
from streamgen.demos.live import Frame, LiveStreams
from streamgen.errors import InputError

RED, BLUE = "a red circle", "a blue star bouncing"
CHUNK, SIDE = 12, 32  # pixel frames of a chunk, the first one aside; picture height and width


@pytest.fixture(scope="module")
def pipe():
    """A pipeline with random weights, 2 layers of 2 heads."""
    from streamgen.models.text import TextEncoder, build_tokenizer
    from streamgen.models.transformer import CausalWanTransformer3DModel
    from streamgen.models.vae import StreamingVAE
    from streamgen.pipelines import StreamingVideoPipeline

    torch.manual_seed(0)
    tokenizer = build_tokenizer("a red blue circle star bouncing".split(), 8)
    size = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=2)
    model = CausalWanTransformer3DModel(in_channels=4, out_channels=4, text_dim=16, text_len=8, **size)
    text = TextEncoder(len(tokenizer), dim=16, num_layers=1, num_heads=2, max_length=8)
    vae = StreamingVAE(latent_channels=4, widths=(8, 8, 8))
    pipe = StreamingVideoPipeline(tokenizer, text.eval(), model.eval(), vae.eval())
    pipe.settings.height = pipe.settings.width = SIDE
    pipe.stream_config = load_preset("default", ["ladder.timesteps=[1000]", "cache.window=9", "cache.sink=3"])
    return pipe


@pytest.fixture
def streams(pipe) -> Iterator[LiveStreams]:
    streams = LiveStreams(pipe, limit=2)
    yield streams
    streams.close()


@pytest.fixture
def broken(pipe, monkeypatch):
    """The model fails from the second chunk on."""
    decode, calls = pipe.vae.decode, []

    def fail(latents, state):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of luck\nand a long explanation")
        return decode(latents, state)

    monkeypatch.setattr(pipe.vae, "decode", fail)


def take(stream, frames: int) -> list[Frame]:
    """So many frames, or all that come before the stream is over."""
    out = []
    while len(out) < frames and not stream.over:
        out += stream.take(min(4, frames - len(out)))
    return out


# ---------------------------------------------------------------------------------------------- streams
def test_frames_are_pictures_in_the_order_of_their_chunks(streams, pipe):
    got = take(streams.start("tab", RED), 9 + CHUNK)
    assert [frame.chunk for frame in got] == [0] * 9 + [1] * CHUNK and {frame.prompt for frame in got} == {RED}
    with pipe.stream(RED) as session:
        wanted = np.concatenate([session.next().frames, session.next().frames])
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(frame.jpeg))) for frame in got])
    assert pictures.shape == (9 + CHUNK, SIDE, SIDE, 3)
    assert np.abs(pictures.astype(int) - wanted).mean() < 8  # JPEG of noise
    assert np.abs(pictures[::-1].astype(int) - wanted).mean() > 8


def test_the_time_to_the_first_frame_is_known_once_it_was_taken(streams):
    stream = streams.start("tab", RED)
    assert stream.first_frame is None
    take(stream, 1)
    first = stream.first_frame
    take(stream, 9)
    assert first > 0 and stream.first_frame == first


def test_a_new_prompt_is_seen_within_two_chunks_and_not_before_it_was_promised(streams):
    stream = streams.start("tab", RED)
    take(stream, 9 + CHUNK + 5)
    change = streams.apply("tab", BLUE)
    got = take(stream, 3 * CHUNK)
    assert all((frame.prompt == BLUE) == (frame.chunk >= change.chunk) for frame in got)
    late = sum(frame.prompt == RED for frame in got)
    assert late <= 1.5 * CHUNK and got[-1].prompt == BLUE  # half a chunk that waits, and one that has begun


def test_a_stream_that_nobody_reads_does_not_grow(streams):
    stream = streams.start("tab", RED)
    while stream.chunks < 1:
        time.sleep(0.005)
    time.sleep(0.2)  # time for many chunks
    assert (stream.chunks, stream.waiting) == (1, 9)
    take(stream, 5)
    while stream.chunks < 2:
        time.sleep(0.005)
    time.sleep(0.2)
    assert (stream.chunks, stream.waiting) == (2, 4 + CHUNK)


def test_a_stream_that_nobody_reads_ends(pipe):
    streams = LiveStreams(pipe, patience=0.05)
    stream = streams.start("tab", RED)
    stream.thread.join(10)
    assert not stream.thread.is_alive() and streams.status()["streams"] == []
    assert streams.find(stream.key) is stream and "nobody watched" in stream.error


def test_stop_frees_the_stream(streams):
    stream = streams.start("tab", RED)
    take(stream, 3)
    assert streams.stop("tab") and stream.over and not stream.take(4, timeout=0)
    stream.thread.join(10)
    assert not stream.thread.is_alive() and stream.session.finished
    assert streams.status()["streams"] == [] and streams.find(stream.key) is None
    assert not streams.stop("tab")
    with pytest.raises(InputError, match="press Start"):
        streams.apply("tab", BLUE)


def test_close_ends_every_thread(pipe):
    streams = LiveStreams(pipe)
    threads = [streams.start(owner, RED).thread for owner in "abc"]
    streams.close()
    assert not any(thread.is_alive() for thread in threads)


def test_two_streams_are_each_alone(streams):
    alone = [frame.jpeg for frame in take(streams.start("a", RED), 30)]
    a, b = streams.start("a", RED), streams.start("b", RED)
    assert a.key != b.key and a.number != b.number
    got = {"a": [], "b": []}
    for step in range(10):
        got["a"] += take(a, 3)
        got["b"] += take(b, 3)
        if step == 2:
            streams.apply("a", BLUE)
    assert [frame.jpeg for frame in got["b"]] == alone
    assert got["a"][-1].prompt == BLUE and got["b"][-1].prompt == RED


def test_the_limit_counts_other_owners_streams_that_play(streams):
    first = streams.start("a", RED)
    streams.start("b", RED)
    with pytest.raises(InputError, match="2 streams .* --max-streams 3"):
        streams.start("c", RED)
    again = streams.start("a", BLUE)  # in place of the first
    assert first.over and not again.over
    streams.stop("b")
    assert take(streams.start("c", RED), 2)


def test_an_empty_prompt_is_refused_and_what_plays_goes_on(streams):
    stream = streams.start("tab", RED)
    for request in (streams.start, streams.apply):
        with pytest.raises(InputError, match="empty"):
            request("tab", " ")
    assert take(stream, 9 + CHUNK)[-1].prompt == RED


def test_a_failure_is_told_after_the_frames_before_it(streams, broken, caplog):
    stream = streams.start("tab", RED)
    assert len(take(stream, 100)) == 9 and stream.over
    assert stream.error == "the model failed: RuntimeError: out of luck"
    assert streams.find(stream.key) is stream  # a page that asks late hears it too
    assert "Traceback" in caplog.text


# ---------------------------------------------------------------------------------------------- http
@pytest.fixture
def client(streams):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'streamgen[demo]'")
    from fastapi.testclient import TestClient

    from streamgen.demos.page import build_app

    return TestClient(build_app(streams))


def test_frames_and_status_over_http(client, streams):
    stream = streams.start("tab", RED)
    answer = client.post(f"/live/{stream.key}?most=3").json()
    assert len(answer["frames"]) == 3 and answer["frames"][0]["prompt"] == RED and not answer["over"]
    assert Image.open(io.BytesIO(base64.b64decode(answer["frames"][0]["jpeg"]))).size == (SIDE, SIDE)
    assert answer["fps"] == 16 and answer["first_frame"] > 0
    assert len(client.post(f"/live/{stream.key}?most=1000").json()["frames"]) <= 8
    status = client.get("/status")
    assert [s["number"] for s in status.json()["streams"]] == [stream.number] and stream.key not in status.text
    client.post(f"/live/{stream.key}/end")
    stream.thread.join(10)
    assert client.get("/status").json() == {"max_streams": 2, "streams": []}
    assert "press Start" in client.post(f"/live/{stream.key}").json()["message"]


def test_a_failure_reaches_the_page(client, streams, broken):
    stream = streams.start("tab", RED)
    frames = []
    while True:
        answer = client.post(f"/live/{stream.key}?most=4").json()
        frames += answer["frames"]
        if answer["over"]:
            break
    assert len(frames) == 9 and answer["message"] == "the model failed: RuntimeError: out of luck"


@pytest.mark.parametrize("path", ["/", "/status", "/view/x"])
def test_browsers_are_told_to_fetch_from_this_server_alone(client, path):
    reply = client.get(path)
    assert reply.status_code == 200 and "http" not in reply.headers["content-security-policy"]
    assert reply.headers["content-security-policy"].startswith("default-src 'self' ")


# ---------------------------------------------------------------------------------------------- command line
def refused(capsys, *argv: str) -> tuple[int, str]:
    code = main(["demo", *argv])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return code, err


def test_without_gradio_the_command_names_the_line_that_adds_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, err = refused(capsys)
    assert code == 3 and re.search(r"needs gradio.*pip install .*\[demo\]", err)


def test_an_address_that_cannot_be_had_is_refused(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", sys)  # anything that is there: the address comes first
    monkeypatch.setattr("streamgen.cli.demo.find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, err = refused(capsys, "--port", port)
    assert code == 2 and f"port {port}" in err and "in use" in err and "--port" in err
    assert refused(capsys, "--port", "65536")[0] == 2
    assert refused(capsys, "--model", "spritse", "--port", "0")[0] == 2


def test_the_page_is_for_this_machine_unless_asked():
    assert parser("demo", "").read([]).host == "127.0.0.1"


# ---------------------------------------------------------------------------------------------- browser
class Server:
    """`streamgen demo` with the embedded model, as a process."""

    def __init__(self, cwd) -> None:
        command = [sys.executable, "-m", "streamgen", "demo", "-q", "--port", "0", "--host", "0.0.0.0"]
        self.process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        watchdog = threading.Timer(90, self.process.kill)
        watchdog.daemon = True
        watchdog.start()
        self.url = self.process.stdout.readline().strip()
        watchdog.cancel()
        assert self.url, self.process.communicate()[1]

    def streams(self) -> dict[int, int]:
        """{number: chunks computed} of the streams that play."""
        with urllib.request.urlopen(f"{self.url}/status", timeout=30) as reply:
            return {stream["number"]: stream["chunks"] for stream in json.load(reply)["streams"]}

    def interrupt(self) -> tuple[int, str]:
        """Ctrl-C: (exit code, what was said on stderr)."""
        self.process.send_signal(signal.SIGINT)
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'streamgen[demo]'")
    server = Server(tmp_path)
    yield server
    server.process.kill()
    server.process.communicate()


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install 'streamgen[dev]'")
    chrome = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chrome or not driver:
        pytest.skip("no browser: apt-get install chromium chromium-driver (`make browser`)")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=900,1000"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # no network
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield Tab(browser)
    browser.quit()


# runs in the frame that shows the picture: sums over the pixels that differ from the background, and a print of all
LOOK = """
const canvas = document.querySelector("canvas");
const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
const sum = [0, 0, 0, 0];
let print = 0;
for (let i = 0; i < data.length; i += 4) {
  print = (print * 31 + data[i] + data[i + 1] + data[i + 2]) | 0;
  if (Math.max(data[i], data[i + 1]) < 128) continue;  // navy
  for (const c of [0, 1, 2]) sum[c] += data[i + c];
  sum[3] += 1;
}
return [print, sum];
"""


class Tab:
    """The page as its user has it."""

    def __init__(self, browser) -> None:
        from selenium.common import exceptions
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser = browser
        ignored = [exceptions.NoSuchElementException, exceptions.StaleElementReferenceException]
        self.wait = WebDriverWait(browser, 30, 0.05, ignored).until

    def open(self, url: str) -> None:
        self.browser.get(url)
        self.wait(lambda _: self.find("#start").is_enabled() and self.find("#prompt textarea, #prompt input"))

    def find(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def click(self, name: str) -> None:
        self.wait(lambda _: self.find(f"#{name}").is_enabled())
        self.find(f"#{name}").click()

    def write(self, prompt: str) -> None:
        from selenium.webdriver import Keys

        self.find("#prompt textarea, #prompt input").send_keys(Keys.CONTROL, "a", Keys.NULL, prompt)

    def to_picture(self) -> None:
        self.browser.switch_to.default_content()
        self.browser.switch_to.frame(self.wait(lambda _: self.find("#picture iframe")))
        self.wait(lambda _: "fps" in self.find("#numbers").text)

    def to_controls(self) -> None:
        self.browser.switch_to.default_content()

    def changes(self, times: int) -> None:
        """Wait for so many different pictures."""
        prints = set()
        self.wait(lambda _: prints.add(self.browser.execute_script(LOOK)[0]) or len(prints) > times)

    def sees(self, channel: int) -> None:
        """Wait for a picture whose actor has most of its colour in `channel`."""

        def look(_):
            *colour, count = self.browser.execute_script(LOOK)[1]
            others = [value for i, value in enumerate(colour) if i != channel]
            return count > 100 and colour[channel] > 1.5 * max(others)

        self.wait(look)


def test_page_in_a_browser(browser, server):
    """Start, frames, a new colour, a second tab that is closed, stop; all without a network."""
    browser.open(server.url)
    browser.click("start")
    browser.to_picture()
    browser.changes(5)
    browser.sees(channel=0)
    assert re.search(r"^\d+\.\d fps, first frame after \d+\.\d\d s$", browser.find("#numbers").text)

    browser.to_controls()
    browser.write("a green circle bouncing on a navy background")
    browser.click("apply")
    browser.to_picture()
    browser.wait(lambda _: "green" in browser.find("#playing").text)
    browser.sees(channel=1)

    first = browser.browser.current_window_handle
    browser.browser.switch_to.new_window("tab")
    browser.open(server.url)
    browser.write("an elephant")
    browser.click("start")
    browser.to_picture()
    browser.to_controls()
    assert "not trained on" in browser.find("#said textarea, #said input").get_attribute("value")
    assert set(server.streams()) == {1, 2}
    browser.browser.close()
    browser.wait(lambda _: set(server.streams()) == {1})
    browser.browser.switch_to.window(first)
    before = server.streams()[1]
    browser.wait(lambda _: server.streams()[1] > before)
    browser.click("stop")
    browser.wait(lambda _: server.streams() == {})
    browser.browser.get(f"{server.url}/view/gone")
    browser.wait(lambda _: "press Start" in browser.find("#message").text)

    code, err = server.interrupt()
    assert code == 130 and err.count("\n") == 1 and err.startswith("warning: --host 0.0.0.0"), err
