"""HTTP on asyncio, as the clients of soak.py speak it: whole answers, and connections that are kept for later requests."""

import asyncio
import json
from typing import NamedTuple

# Seconds that an unused connection is kept; the server keeps it for longer.
KEPT = 20


class Answer(NamedTuple):
    status: int
    headers: dict
    body: bytes

    def json(self):
        return json.loads(self.body)

    def events(self):
        """The data of its server-sent events, as texts."""
        parts = self.body.decode().split("\n\n")
        if parts.pop() != "" or not all(part.startswith("data: ") for part in parts):
            raise ValueError("the stream is no server-sent events")
        return [part.removeprefix("data: ") for part in parts]


def message(method, path, body=b"", headers=(), length=None):
    """A request's bytes. `length` is what it says of its body, where that is not true."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {len(body) if length is None else length}"]
    lines += [f"{name}: {value}" for name, value in dict(headers).items()]
    return "\r\n".join([*lines, "\r\n"]).encode() + body


async def answer(reader):
    """The next answer that a stream holds. Errors: `EOFError`, `OSError` or `ValueError` for half of one."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    body = bytearray()
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    else:
        body += await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(int(first.split()[1]), headers, bytes(body))


class Client:
    """Asks the server at `host:port`."""

    def __init__(self, address):
        host, port = address.split(":")
        self.address = (host, int(port))
        self.idle = []  # Connections that an answer has left open, and since when.
        self.reused = 0

    async def connect(self):
        return await asyncio.open_connection(*self.address)

    async def _connection(self):
        while self.idle:
            since, reader, writer = self.idle.pop()
            if asyncio.get_running_loop().time() < since + KEPT and not reader.at_eof():
                self.reused += 1
                return reader, writer
            writer.close()
        return await self.connect()

    async def ask(self, method, path, body=b"", headers=()):
        """The answer. Errors: what `answer` says; a connection that is used again must not be a worse one."""
        reader, writer = await self._connection()
        try:
            writer.write(message(method, path, body, headers))
            got = await answer(reader)
        except BaseException:
            writer.transport.abort()
            raise
        if got.headers.get("connection") == "close":
            writer.close()
        else:
            self.idle.append((asyncio.get_running_loop().time(), reader, writer))
        return got

    async def post(self, path, body, headers=()):
        return await self.ask("POST", path, json.dumps(body).encode(), {"content-type": "application/json", **dict(headers)})

    def close(self):
        """Closes what is kept."""
        while self.idle:
            self.idle.pop()[2].close()
