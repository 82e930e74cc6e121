"""What the tests of the server ask, and a model that answers when it is told to."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from vz_edge.device.model import EdgeModel
from vz_edge.device.reply import Reply, Stream
from vz_edge.serve.app import create_app
from vz_edge.serve.engine import Engine
from vz_edge.serve.server import bind
from vz_edge.serve.settings import Settings

WAIT_SEC = 60.0  # for what takes milliseconds on an idle machine
PIECES = ("one", " two", " three")


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture like no other: width x height pixels of noise around a colour."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(0, 256, 3)
    pixels = np.clip(colour + rng.integers(-20, 20, (size[1], size[0], 3)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def file_of(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def data_url(file: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(file).decode()}"


def content(text: str, *urls: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]


def request(text: str = "What?", *urls: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    message = {"role": "user", "content": content(text, *urls)}
    return {"model": "stand-in", "messages": [message], "max_tokens": 6, **fields}


@contextlib.contextmanager
def serving(engine: Engine, settings: Settings) -> Iterator[int]:
    """uvicorn in a thread; gives the port."""
    config = uvicorn.Config(create_app(engine, settings), http="h11", ws="none", lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    with bind("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(WAIT_SEC)
    assert not thread.is_alive()


class ScriptedModel:
    """Answers with PIECES, each of which waits to be let go. ``closed`` counts answers that were ended early."""

    def __init__(self, model: EdgeModel) -> None:
        self.manifest = model.manifest
        self.chat = model.chat
        self.context_length = model.context_length
        self.started = threading.Semaphore(0)
        self.closed = threading.Semaphore(0)
        self.asked: list[Any] = []
        self._go = threading.Semaphore(0)

    def cached(self, max_bytes: int | None) -> ScriptedModel:
        return self

    def clear(self) -> None:
        """There is nothing to forget."""

    def let_go(self, pieces: int) -> None:
        self._go.release(pieces)

    def stream(self, image: Any, prompt: Any, **options: Any) -> Stream:
        self.asked.append((image, prompt, options))
        return Stream(self._answer())

    def _answer(self) -> Generator[str, None, Reply]:
        self.started.release()
        try:
            for piece in PIECES:
                self._go.acquire()
                yield piece
        except GeneratorExit:
            self.closed.release()
            raise
        return Reply("".join(PIECES), "stop", (1, 2, 3), 5, 7, 0, 0.0, 0.0, 0.0, 0.0)
