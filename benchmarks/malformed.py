"""HTTP requests that are wrong in every way that a fixed seed can think of, as bytes to be written to a socket.

Three layers are broken: the HTTP message (sizes, headers, methods, encodings), the text of its JSON body, and the
values in it. A few requests come out right, or wrong in a way that does no harm: what counts is that none is answered
with a status of 500 or more.
"""

from __future__ import annotations

import base64
import copy
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

CHAT = "/v1/chat/completions"
Raw = tuple[bytes, bool]


class Malformed(NamedTuple):
    """A request to write to a socket; of one that ``is_cut_off`` the server awaits more until the client hangs up."""

    layer: str
    raw: bytes
    is_cut_off: bool


class Literal:
    """JSON text that Python's json would not write."""

    def __init__(self, text: str) -> None:
        self.text = text


def malformed_requests(count: int, seed: int, body: dict[str, Any]) -> Iterator[Malformed]:
    """``count`` requests made of ``body``, a right request; the same ones for the same seed."""
    rng = random.Random(seed)
    layers: dict[str, Callable[[random.Random, dict[str, Any]], Raw]] = {
        "values": lambda rng, body: (message(_broken_values(rng, body)), False),
        "text": lambda rng, body: (message(_broken_text(rng, json.dumps(body).encode())), False),
        "HTTP": _broken_http,
    }
    for number in range(count):
        name = list(layers)[number % len(layers)]
        raw, is_cut_off = layers[name](rng, body)
        yield Malformed(name, raw, is_cut_off)


def message(body: bytes, head: bytes = b"", start: str = f"POST {CHAT} HTTP/1.1") -> bytes:
    """An HTTP request; ``head`` takes the place of the headers that describe the body."""
    described = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n".encode()
    return f"{start}\r\nHost: localhost\r\nConnection: close\r\n".encode() + (head or described) + b"\r\n" + body


def png_bomb(side: int) -> bytes:
    """A PNG of a hundred bytes that promises ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def _url(file: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, "", " ", 0, -1, 0.5, -0.0, 2**31, 2**63, -(2**63) - 1, 2**64, 1e308, 5e-324),
    *(Literal("NaN"), Literal("-Infinity"), Literal("1e999"), Literal("1" * 5000), Literal("1." + "0" * 5000)),
    *(Literal('"\\ud800"'), Literal('"\\u0000"'), Literal("[" * 500 + "]" * 500), Literal('{"a":1,"a":2}')),
    *("\x00", "é" * 100, "\u202e\u200b😀", "a" * 50_000, "<image>", "<image>" * 50, "</s>", "<s>", "{{ 7 * 7 }}"),
    *("{% raw %}", "user", "system", "assistant", "tool", "text", "image_url", "json_object", "vz-demo", "auto"),
    *([[]], [None], [{}], {"": None}, {"type": "image_url"}, {"type": "text", "text": []}, ["x"] * 5000),
    *("http://127.0.0.1/", "http://169.254.169.254/", "file:///etc/passwd", "data:", "data:,", "data:image/png"),
    *("data:image/png;base64,", "data:image/png;base64,====", "data:image/png;base64,%%%", _url(b""), _url(b"%!PS\n")),
    *(_url(png_bomb(3)), _url(png_bomb(20_000)), _url(png_bomb(2**31 - 1)), _url(b"\x89PNG\r\n\x1a\n")),
    *(
        _url(b"GIF89a\xff\xff\xff\xff\0\0\0"),
        _url(b"\xff\xd8\xff\xe0"),
        _url(b"RIFF\xff\xff\xff\xffWEBPVP8X\x0a" + b"\xff" * 20),
    ),
)
SCHEMAS: tuple[Any, ...] = (
    *({}, {"type": "nonsense"}, {"type": 5}, {"$ref": "#"}, {"$ref": "http://127.0.0.1/"}, {"pattern": "("}),
    *({"type": "string", "pattern": "(a+)+$"}, {"type": "string", "pattern": "(?=x)"}, {"minimum": 5, "maximum": 1}),
    *({"type": "array", "minItems": 10**9}, {"type": "string", "maxLength": 10**12}, {"multipleOf": 0}, {"enum": []}),
    *({"x-guidance": 5}, {"properties": []}, {"type": ["string", 5]}, {"anyOf": {}}, {"allOf": [False]}),
    *({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, {"type": "object", "properties": 5}),
)
FIELDS = (
    *(
        "model",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream",
        "n",
    ),
    *("stream_options", "response_format", "logprobs", "top_logprobs", "tools", "tool_choice", "logit_bias", "user"),
    *("presence_penalty", "frequency_penalty", "modalities", "metadata", "store", "unknown", "__proto__", ""),
)


def _broken_values(rng: random.Random, body: dict[str, Any]) -> bytes:
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.randrange(5)
        if kind == 0:
            schema = {"name": "a", "schema": rng.choice(SCHEMAS)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif kind == 1:
            body[rng.choice(FIELDS)] = copy.deepcopy(rng.choice(VALUES))
        elif places := list(_places(body)):
            holder, key = rng.choice(places)
            if kind == 2:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    return _dumps(body).encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _dumps(value: Any) -> str:
    if isinstance(value, Literal):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_dumps(item) for item in value) + "]"
    return json.dumps(value)


def _broken_text(rng: random.Random, text: bytes) -> bytes:
    at = rng.randrange(len(text))
    early = rng.randrange(min(200, len(text)))  # where the structure is, in front of the picture
    return rng.choice(
        [
            text[:at],
            text[at:],
            text[:early] + text[early + 1 :],
            text[:early] + rng.randbytes(rng.randrange(1, 9)) + text[early:],
            text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1 :],
            text[:early] + rng.choice(b'{}[]":,\\').to_bytes(1, "big") + text[early:],
            text + text,
            text + b"\0",
            b"\xef\xbb\xbf" + text,
            text.decode().encode("utf-16"),
            text.replace(b'"', b"'"),
            text.replace(b"}", b",}"),
            b"// comment\n" + text,
            b"[" * rng.choice((10, 1000, 200_000)),
            b'{"messages":' * rng.choice((10, 1000, 20_000)),
            b'{"model": "vz-demo", "messages": ' + b"[" * 1000 + b"]" * 1000 + b"}",
            rng.randbytes(rng.randrange(1, 5000)),
            b"",
            b"null",
            b'"' + b"\\" * 9999,
            b"-",
            b"9" * 100_000,
        ]
    )


PATHS = ("/", "//", "/v1/models/" + "x" * 2000, "/%00", "/../../etc/passwd", "/v1/models/%ff", "*", "/a?" + "b" * 2000)
METHODS = ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH", "CONNECT", "post", "GET\t", "é", "")
VERSIONS = ("1.0", "0.9", "2.0", "9", "1.1 x")
SIZES = (b"-1", b"+5", b"0x10", b"1e3", b"", b"9" * 30, b"5, 5", b"\xb2")
CHUNKS = (b"zz\r\n", b"-5\r\n", b"f" * 30 + b"\r\n", b"5;" + b"x" * 70_000)
HOSTS = (b"Host: evil.example", b"Host:", b"X: y", b"Host: a\r\nHost: localhost")
TYPES = (b"X: y", b"Content-Type: text/plain", b"Content-Type: \xff", b"Content-Type: application/json, text/plain")
HEADERS = (
    *(
        b"X: " + b"x" * 70_000,
        b"X: y\r\n" * 2000 + b"X: y",
        b"X : y",
        b"X\0: y",
        b"X: \0",
        b": y",
        b"X: \xff",
        b" folded",
    ),
    *(b"Expect: 100-continue", b"Upgrade: websocket\r\nConnection: upgrade", b"Content-Encoding: gzip"),
    *(b"Content-Type: text/plain", b"Range: bytes=0-", b"Authorization: Bearer \xff", b"Transfer-Encoding: chunked"),
)


def _broken_http(rng: random.Random, body: dict[str, Any]) -> Raw:
    text = json.dumps(body).encode()
    small = json.dumps({**body, "messages": [{"role": "user", "content": "Hello"}]}).encode()
    length = str(len(small)).encode()
    sized = b"Content-Type: application/json\r\nContent-Length: %s\r\n"
    chunked = b"Content-Type: application/json\r\nTransfer-Encoding: %s\r\n"
    chunk = b"%x\r\n%s\r\n" % (len(small), small)
    cut_off = [
        message(text[: rng.randrange(len(text))], sized % str(len(text)).encode()),
        message(small, sized % str(len(small) + rng.choice((1, 1000, 10**6))).encode()),
        message(chunk, chunked % b"chunked"),
        message(text)[: rng.randrange(1, 60)],
        rng.randbytes(rng.randrange(1, 200)),
        b"",
    ]
    whole = [
        message(small, sized % str(rng.randrange(len(small))).encode()),
        message(small, sized % rng.choice(SIZES)),
        message(small, sized % length + b"Content-Length: %s\r\n" % rng.choice((length, b"5"))),
        message(chunk + b"0\r\n\r\n", chunked % rng.choice((b"gzip", b"chunked, chunked", b"\xff"))),
        message(rng.choice(CHUNKS), chunked % b"chunked"),
        message(small, b"%s\r\nContent-Length: %s\r\n" % (rng.choice(TYPES), length)),
        message(small, sized % length + rng.choice(HEADERS) + b"\r\n"),
        message(small, start=f"POST {CHAT} HTTP/{rng.choice(VERSIONS)}"),
        message(small, start=f"{rng.choice(METHODS)} {CHAT} HTTP/1.1"),
        message(b"", b"X: y\r\n", f"GET {rng.choice(PATHS)} HTTP/1.1"),
        message(small).replace(b"Host: localhost", rng.choice(HOSTS)),
        message(small).replace(b"\r\n", b"\n"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
    return (rng.choice(cut_off), True) if rng.random() < 0.25 else (rng.choice(whole), False)
