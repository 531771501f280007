"""Clients of a server under test, and their tapes: what each of them has really received.

Owns the mix of requests and the counting of what arrives. Knows nothing of the ledger, and believes no number that
the server tells: tokens are counted by the ids in the events (`return_token_ids`).
"""

import asyncio
import dataclasses
import json
import random
import time

# Longest that a client waits for the next byte. A server that is alive sends pings before that.
PATIENCE = 120.0
PROMPTS = ["Bonjour", "Qui es-tu ?", "Combien font deux et deux ?", "Il était une fois", "The", "Une liste :"]
STOPS = ["e", "a", ".", " de", "ou", "\n", "les ", "on"]


@dataclasses.dataclass
class Tape:
    """One request as its client saw it."""

    endpoint: str
    prompts: int
    n: int
    max_tokens: int
    stream: bool
    # Ours, from the answer's head; None where no head came.
    id: str | None = None
    status: int | None = None
    # Ids of tokens received, over all choices.
    tokens: int = 0
    # The whole answer came: `[DONE]` without an error before it, or a body of the announced length.
    ended: bool = False
    # What the server said it had used, where it did.
    usage: dict | None = None
    # Code of an error, as an event or a body.
    error: str | None = None
    # Retry-After of a refusal.
    retry_after: str | None = None
    # The client hung up before the end.
    left: bool = False
    finish: list = dataclasses.field(default_factory=list)
    # Seconds: sent, first token, end.
    times: list = dataclasses.field(default_factory=list)

    def line(self):
        """As JSON."""
        return json.dumps(dataclasses.asdict(self))


def write(tapes, path):
    """One tape a line."""
    with open(path, "w", encoding="utf-8") as file:
        for tape in tapes:
            file.write(tape.line() + "\n")


class Mix:
    """Requests of all kinds, the same for the same seed."""

    def __init__(self, seed, model, chat=True, leave=0.3, longest=60, bad=0.03):
        self.random = random.Random(seed)
        self.model, self.chat, self.leave, self.longest, self.bad = model, chat, leave, longest, bad

    def next(self):
        """An empty tape, the body to send, and when to hang up: None, ("tokens", k) or ("seconds", s)."""
        rng = self.random
        stream = rng.random() < 0.75
        chat = self.chat and rng.random() < 0.6
        n = rng.choice([1, 1, 1, 2, 3])
        prompts = 1 if chat else rng.choice([1, 1, 2, 3])
        longest = rng.randint(1, self.longest)
        body = {
            "model": self.model, "n": n, "max_tokens": longest, "stream": stream, "return_token_ids": True,
            "temperature": rng.choice([0, 1.0]), "seed": rng.randrange(1 << 31),
        }
        if rng.random() < 0.5:
            body["ignore_eos"] = True
        if stream and rng.random() < 0.7:
            body["stream_options"] = {"include_usage": True}
        if rng.random() < 0.25:
            body["stop"] = rng.sample(STOPS, rng.randint(1, 2))
        if rng.random() < self.bad:
            body["n"] = 0
        texts = [rng.choice(PROMPTS) for _ in range(prompts)]
        if chat:
            body["messages"] = [{"role": "user", "content": texts[0]}]
        else:
            body["prompt"] = texts
        leave = None
        if rng.random() < self.leave:
            most = longest * n * prompts
            leave = ("tokens", rng.randrange(most)) if stream else ("seconds", rng.random() * 0.3)
        tape = Tape("chat" if chat else "completion", prompts, n, longest, stream)
        return tape, body, leave


class Client:
    """Sends requests to one server."""

    def __init__(self, address, headers=()):
        self.host, port = address.rsplit(":", 1)
        self.port, self.headers = int(port), list(headers)

    async def run(self, tape, body, leave=None):
        """Fills a tape. Returns it however the request ends; only a wrong answer raises."""
        began = time.monotonic()
        tape.times = [began]
        try:
            deadline = leave[1] if leave and leave[0] == "seconds" else None
            async with asyncio.timeout(deadline):
                await self._exchange(tape, body, leave)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # The server is gone; the tape says how far it came.
        except TimeoutError:
            tape.left = True
        tape.times.append(time.monotonic())
        return tape

    async def _exchange(self, tape, body, leave):
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            path = "/v1/chat/completions" if tape.endpoint == "chat" else "/v1/completions"
            data = json.dumps(body).encode()
            head = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", "Content-Type: application/json",
                    f"Content-Length: {len(data)}", *self.headers]
            writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + data)
            headers = await _head(reader, tape)
            limit = leave[1] if leave and leave[0] == "tokens" else None
            if headers.get("content-type") == "text/event-stream":
                await _events(reader, tape, limit)
            else:
                tape.retry_after = headers.get("retry-after")
                _whole(tape, await _patiently(reader.readexactly(int(headers["content-length"]))))
        finally:
            # Not closed but aborted: what the kernel still holds is thrown away, as when a client dies.
            writer.transport.abort()


async def _patiently(awaitable):
    """The next bytes. A server that says nothing for so long is broken, which is not the client's leaving."""
    try:
        async with asyncio.timeout(PATIENCE) as patience:
            return await awaitable
    except TimeoutError as error:
        if patience.expired():
            raise RuntimeError(f"nothing for {PATIENCE} s") from error
        raise


async def _head(reader, tape):
    lines = (await _patiently(reader.readuntil(b"\r\n\r\n"))).decode().split("\r\n")
    tape.status = int(lines[0].split(" ")[1])
    pairs = (line.split(": ", 1) for line in lines[1:] if line)
    headers = {name.lower(): value for name, value in pairs}
    tape.id = headers["x-request-id"].removeprefix("req-")
    return headers


async def _events(reader, tape, limit):
    buffer = b""
    while True:
        size = int((await _patiently(reader.readuntil(b"\r\n"))), 16)
        if size == 0:
            return
        chunk = await _patiently(reader.readexactly(size + 2))
        buffer += chunk[:-2]
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                _event(tape, line[6:])
            if limit is not None and tape.tokens > limit and not tape.ended:
                tape.left = True
                return


def _event(tape, data):
    if data == b"[DONE]":
        tape.ended = tape.error is None
        return
    event = json.loads(data)
    if "error" in event:
        tape.error = event["error"]["code"]
        return
    for choice in event["choices"]:
        tokens = len(choice.get("token_ids") or ())
        if tokens and len(tape.times) == 1:
            tape.times.append(time.monotonic())
        tape.tokens += tokens
        if choice.get("finish_reason"):
            tape.finish.append(choice["finish_reason"])
    if event.get("usage"):
        tape.usage = event["usage"]


def _whole(tape, body):
    answer = json.loads(body)
    if "error" in answer:
        tape.error = answer["error"]["code"]
        return
    tape.tokens = sum(len(choice["token_ids"]) for choice in answer["choices"])
    tape.finish = [choice["finish_reason"] for choice in answer["choices"]]
    tape.usage, tape.ended = answer["usage"], True


class Load:
    """`streams` clients at once: `requests` in all, or until told to finish."""

    def __init__(self, client, mix, streams, requests=None, tapes=None):
        self.client, self.mix, self.streams = client, mix, streams
        self.left = float("inf") if requests is None else requests
        self.tapes = [] if tapes is None else tapes

    def finish(self):
        """No new requests; those that run come to their end."""
        self.left = 0

    async def run(self):
        """Returns when nothing runs any more: all is done, or the server is gone."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self.streams):
                group.create_task(self._one())
        return self.tapes

    async def _one(self):
        while self.left > 0:
            self.left -= 1
            tape, body, leave = self.mix.next()
            # Known before it is sent: a request that is cut off has a tape too.
            self.tapes.append(tape)
            await self.client.run(tape, body, leave)
            if tape.status is None and not tape.left:
                self.left = 0  # The server is gone.
            if tape.status == 503:
                await asyncio.sleep(0.05)
