"""The requests of soak.py, and whether their answers are right: those that ask for what there is, and those that do not."""

import asyncio
import itertools
import json
import random
import socket
from collections.abc import Callable
from typing import NamedTuple

from client import answer, message

WORDS = """the a of and to in is was that for it with as his on be at by had not are but from or have an they which one you
were all her she there would their we him been has when who will no more if out so up said what its about than into them can
only other time new some could these two may first then do""".split()
FILMS = ["The film was a delight.", "I want my money back.", "Nobody will remember it, and nobody should."]
PROMPTS = ["Once upon a time", "The striker scored twice and", "The film was"]
# Every task that has an exact answer: the path and the body, but for the adapter. Names of classes come with a head.
PROBES = [("/v1/generate", {"prompt": prompt, "max_tokens": 16}) for prompt in PROMPTS]
PROBES += [("/v1/classify", {"input": FILMS})]
PET = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
# How a request is not answered, by the type of its error: those of a server that has too much to do.
REFUSALS = {"overloaded_error": 429, "unavailable_error": 503, "timeout_error": 504}
# The longest body that the server reads.
MAX_BODY = 16 << 20


class Wrong(Exception):
    """An answer that must not be."""


class Adapter(NamedTuple):
    name: str
    # The adapter in the repository that it says the same as; `None` is the base.
    original: str | None
    classifies: bool


BASE = Adapter("base", None, False)


class Request(NamedTuple):
    kind: str
    path: str
    body: dict
    # Gets the answer, and raises if it is not right.
    check: Callable
    # Sequences that the engine computes for it, one after the other if it has no place for more.
    sequences: int = 1
    # Seconds.
    deadline: float | None = None
    # Whether its adapter may be gone.
    gone: bool = False


def require(right, what):
    if not right:
        raise Wrong(what)


def outcome(request, got):
    """The status of an answer; of a stream that ends in an error, that one's. Raises `Wrong` for what must not be."""
    status, shown = got.status, got.body[:300]
    if status == 200:
        try:
            status = failed_within(got) or 200
            if status == 200:
                request.check(got)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
            raise Wrong(f"{e!r} in {got.body[-600:]}") from e
    elif status == 404 and request.gone:
        return status
    require(status in (200, *REFUSALS.values()), f"{status} {shown}")
    require(status != 504 or request.deadline, f"504 without a deadline: {shown}")
    if got.status in (429, 503):
        seconds = got.headers.get("retry-after", "none")
        require(seconds.isdigit() and 1 <= int(seconds) <= 60, f"{status} with a Retry-After of {seconds}")
    return status


def failed_within(got):
    """The status of the error that ends a stream."""
    if got.headers["content-type"] != "text/event-stream":
        return None
    last = got.events()[-1]
    error = last != "[DONE]" and json.loads(last).get("error")
    if not error:
        return None
    require(error["type"] in REFUSALS, f"a stream ends with {last}")
    return REFUSALS[error["type"]]


def check_text(text, finish, tokens, most):
    require(isinstance(text, str), f"text {text!r}")
    require(finish in ("stop", "length", "eos_token", "stop_sequence"), f"ended by {finish!r}")
    require(tokens is None or 1 <= tokens <= most, f"{tokens} tokens of {most}")


def check_pet(text, finish):
    """That it keeps to the schema, if it was not cut."""
    if finish != "stop":
        return
    pet = json.loads(text)
    require(set(pet) == {"name", "kind"} and pet["kind"] in ("cat", "dog") and len(pet["name"]) <= 12, f"a pet {text}")


class Traffic:
    """Requests of all kinds, at random. `expected` has what each probe says on each original: {(original, probe): value}."""

    def __init__(self, seed, adapters, changing, expected):
        self.random = random.Random(seed)
        self.adapters = [*adapters]
        self.random.shuffle(self.adapters)
        # The base is asked for often.
        self.adapters.insert(1, BASE)
        # Zipf's law.
        self.weights = list(itertools.accumulate(1 / (i + 1) for i in range(len(self.adapters))))
        self.changing = changing
        self.expected = expected
        self.deadlines = None  # Seconds, from and to, that some ask for.
        kinds = {
            self.chat: 26,
            self.completion: 22,
            self.classification: 14,
            self.labels: 3,
            self.generation: 12,
            self.lorax: 10,
            self.pet: 6,
            self.probe: 7,
        }
        self.kinds, self.kind_weights = list(kinds), list(itertools.accumulate(kinds.values()))

    def well_formed(self):
        """A request that is to be answered, with a deadline now and then."""
        (make,) = self.random.choices(self.kinds, cum_weights=self.kind_weights)
        request = make()
        if self.deadlines and self.random.random() < 0.06:
            request = request._replace(deadline=self.random.uniform(*self.deadlines))
        return request

    def adapter(self, classifies=False):
        while True:
            (adapter,) = self.random.choices(self.adapters, cum_weights=self.weights)
            if adapter.classifies or not classifies:
                return adapter

    def words(self, least, most):
        return " ".join(self.random.choices(WORDS, k=self.random.randint(least, most)))

    def sampling(self):
        """Fields that all dialects but LoRAX's share, and how many tokens they allow."""
        most = min(48, 1 + int(self.random.expovariate(1 / 16)))
        fields = {"max_tokens": most, "temperature": self.random.choice([0, 0.8])}
        if self.random.random() < 0.2:
            fields["stop"] = ["\n\n"]
        return fields

    def chat(self):
        adapter, stream, sampling = self.adapter(), self.random.random() < 0.45, self.sampling()
        most = sampling["max_tokens"]
        messages = [{"role": "user", "content": self.words(3, 120)}]
        if self.random.random() < 0.5:
            # What many prompts begin with.
            messages.insert(0, {"role": "system", "content": "You are a patient assistant. " + " ".join(WORDS[:40])})

        def check(got):
            if not stream:
                choice, usage = got.json()["choices"][0], got.json()["usage"]
                return check_text(choice["message"]["content"], choice["finish_reason"], usage["completion_tokens"], most)
            *events, end = got.events()
            choices = [json.loads(event)["choices"][0] for event in events]
            require(end == "[DONE]", f"a chat ends with {end}")
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            check_text(text, choices[-1]["finish_reason"], None, most)

        body = {"model": adapter.name, "messages": messages, "stream": stream, **sampling}
        return Request("chat, streamed" if stream else "chat", "/v1/chat/completions", body, check)

    def completion(self):
        adapter, stream, sampling = self.adapter(), self.random.random() < 0.45, self.sampling()
        n, most = self.random.choice([1, 1, 1, 2]), sampling["max_tokens"]

        def check(got):
            if stream:
                *events, end = got.events()
                require(end == "[DONE]", f"a completion ends with {end}")
                pieces = [choice for event in events for choice in json.loads(event)["choices"]]
                total = None
            else:
                pieces, total = got.json()["choices"], got.json()["usage"]["completion_tokens"]
            for index in range(n):
                own = [piece for piece in pieces if piece["index"] == index]
                check_text("".join(piece["text"] for piece in own), own[-1]["finish_reason"], total, n * most)

        body = {"model": adapter.name, "prompt": self.words(1, 160), "n": n, "stream": stream, **sampling}
        if self.random.random() < 0.2:
            body["logprobs"] = 2
        return Request("completion, streamed" if stream else "completion", "/v1/completions", body, check)

    def classification(self):
        adapter, count = self.adapter(classifies=True), self.random.choice([1, 1, 1, 2, 3])

        def check(got):
            results = got.json()["results"]
            require(len(results) == count, f"{len(results)} results for {count} texts")
            for result in results:
                require(abs(sum(result["scores"].values()) - 1) < 1e-3, f"scores {result}")

        body = {"adapter": adapter.name, "input": [self.words(3, 90) for _ in range(count)]}
        return Request("classification", "/v1/classify", body, check, sequences=count)

    def labels(self):
        """A classification without a head."""
        labels = ["sport", "cooking"]
        check = lambda got: require(got.json()["results"][0]["label"] in labels, "a label that was not asked for")
        return Request("labels", "/v1/classify", {"input": self.words(3, 60), "labels": labels}, check, sequences=2)

    def generation(self):
        adapter, stream, sampling = self.adapter(), self.random.random() < 0.45, self.sampling()
        gone = self.random.random() < 0.25
        name = self.random.choice(self.changing) if gone else adapter.name

        def check(got):
            if stream:
                *events, last, end = got.events()
                require(end == "[DONE]", f"a generation ends with {end}")
                events, last = [json.loads(event) for event in events], json.loads(last)
                last["text"] = "".join(event["text"] for event in events) + last["text"]
            else:
                last = got.json()
            check_text(last["text"], last["finish_reason"], last["usage"]["completion_tokens"], sampling["max_tokens"])

        body = {"adapter": name, "prompt": self.words(1, 160), "stream": stream, **sampling}
        kind = "generation, streamed" if stream else "generation"
        return Request(kind, "/v1/generate", body, check, gone=gone)

    def lorax(self):
        adapter, stream = self.adapter(), self.random.random() < 0.4
        most = min(48, 1 + int(self.random.expovariate(1 / 16)))

        def check(got):
            last = json.loads(got.events()[-1]) if stream else got.json()
            details = last["details"]
            check_text(last["generated_text"], details["finish_reason"], details["generated_tokens"], most)

        name = "__base_model__" if adapter.original is None else adapter.name
        parameters = {"adapter_id": name, "max_new_tokens": most, "details": True, "do_sample": self.random.random() < 0.5}
        body = {"inputs": self.words(1, 160), "parameters": parameters}
        path = "/generate_stream" if stream else "/generate"
        return Request("LoRAX, streamed" if stream else "LoRAX", path, body, check)

    def pet(self):
        def check(got):
            choice = got.json()["choices"][0]
            check_pet(choice["message"]["content"], choice["finish_reason"])

        ask = f"{self.words(3, 20)}. Name a pet."
        body = {"model": self.adapter().name, "messages": [{"role": "user", "content": ask}], "max_tokens": 40}
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "pet", "schema": PET}}
        return Request("JSON of a schema", "/v1/chat/completions", body, check)

    def probe(self, number=None, adapter=None):
        """A request whose answer is known to the last bit."""
        number = self.random.randrange(len(PROBES)) if number is None else number
        path, body = PROBES[number]
        adapter = adapter or self.adapter(classifies=path == "/v1/classify")
        expected = self.expected[adapter.original, number]

        def check(got):
            require(said(got) == expected, f"{adapter.name} says {said(got)}; before the load it said {expected}")

        return Request("probe", path, {**body, "adapter": adapter.name}, check, sequences=len(body.get("input", "1")))


def said(got):
    """What a probe's answer says."""
    whole = got.json()
    return whole.get("results") or [whole["text"], whole["finish_reason"]]


class Awkward:
    """Clients that a server would rather not have. Each method is one: it returns how it ended, or raises `Wrong`."""

    # Slow readers at the same time; each keeps an adapter in memory.
    SLOW = 4

    def __init__(self, traffic, client):
        self.traffic, self.client, self.random = traffic, client, traffic.random
        self.slow, self.huge = 0, asyncio.Lock()
        kinds = {
            self.leaves_before_the_answer: 16,
            self.leaves_a_stream: 16,
            self.reads_slowly: 6,
            self.sends_half_a_body: 5,
            self.sends_half_a_head: 3,
            self.sends_no_http: 3,
            self.sends_nonsense: 30,
            self.names_no_adapter: 8,
            self.asks_for_too_much: 6,
            self.sends_a_huge_body: 1,
            self.leaves_an_upload: 3,
            self.takes_a_wrong_way: 3,
        }
        self.kinds, self.weights = list(kinds), list(itertools.accumulate(kinds.values()))

    def one(self):
        return self.random.choices(self.kinds, cum_weights=self.weights)[0]

    def _generation(self, words, tokens, **fields):
        body = {"prompt": self.traffic.words(words, words), "max_tokens": tokens, "ignore_eos": True, **fields}
        body["adapter"] = self.traffic.adapter().name
        return json.dumps(body).encode()

    def _leave(self, writer):
        """Hangs up, politely or not."""
        if self.random.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()

    async def _refused(self, path, body, status, method="POST"):
        got = await self.client.ask(method, path, body)
        require(got.status == status, f"{method} {path} {body[:80]} was answered {got.status} {got.body[:200]}")
        require(got.json()["error"]["message"], f"{got.status} without a message")
        return str(got.status)

    async def leaves_before_the_answer(self):
        _, writer = await self.client.connect()
        writer.write(message("POST", "/v1/generate", self._generation(300, 40)))
        await asyncio.sleep(self.random.uniform(0, 3))
        self._leave(writer)
        return "left"

    async def leaves_a_stream(self):
        reader, writer = await self.client.connect()
        writer.write(message("POST", "/v1/generate", self._generation(20, 60, stream=True)))
        head = await reader.readuntil(b"\r\n\r\n")
        refused = not head.startswith(b"HTTP/1.1 200 ")
        if not refused:
            for _ in range(self.random.randrange(40)):
                await reader.readline()
        self._leave(writer)
        return "refused" if refused else "left"

    async def reads_slowly(self):
        """A byte now and then, with a small buffer; then either all the rest, which must be there, or nothing more."""
        if self.slow == self.SLOW:
            return "too many"
        self.slow += 1
        loop, slow = asyncio.get_running_loop(), socket.socket()
        try:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.setblocking(False)
            await loop.sock_connect(slow, self.client.address)
            body = self._generation(10, 96, stream=True, logprobs=20)
            await loop.sock_sendall(slow, message("POST", "/v1/generate", body, {"connection": "close"}))
            seen = bytearray()
            for _ in range(self.random.randint(50, 120)):
                byte = await loop.sock_recv(slow, 1)
                if not byte:
                    break
                seen += byte
                await asyncio.sleep(0.2)
            if self.random.random() < 0.3:
                return "left"
            while more := await loop.sock_recv(slow, 1 << 16):
                seen += more
        finally:
            self.slow -= 1
            slow.close()
        reader = asyncio.StreamReader()
        reader.feed_data(bytes(seen))
        reader.feed_eof()
        got = await answer(reader)
        status = outcome(Request("slow", "", {}, lambda got: require(got.events()[-1] == "[DONE]", "no end")), got)
        return "read to the end" if status == 200 else str(status)

    async def _given_up(self, sent):
        """What a client gets that sends something and then no more, if it waits: an error, or the connection's end."""
        reader, writer = await self.client.connect()
        try:
            writer.write(sent)
            if self.random.random() < 0.5:
                await asyncio.sleep(self.random.uniform(0, 2))
                return "left"
            got = await asyncio.wait_for(answer(reader), 60)
            require(400 <= got.status < 500, f"{sent[:80]} was answered {got.status} {got.body[:100]}")
            return str(got.status)
        except asyncio.IncompleteReadError as e:
            require(not e.partial, f"half an answer: {e.partial[:100]}")
            return "hung up on"
        except ConnectionError:
            return "hung up on"
        except TimeoutError:
            raise Wrong(f"{sent[:80]} was neither answered nor hung up on in a minute") from None
        finally:
            self._leave(writer)

    async def sends_half_a_body(self):
        body = self._generation(50, 10)
        return await self._given_up(message("POST", "/v1/generate", body[: len(body) // 2], length=len(body)))

    async def sends_half_a_head(self):
        return await self._given_up(b"POST /v1/generate HTTP/1.1\r\nhost: localhost\r\ncontent-len")

    async def sends_no_http(self):
        return await self._given_up(self.random.randbytes(60) + b"\r\n\r\n")

    async def sends_nonsense(self):
        deep = "[" * 10_000 + "]" * 10_000
        texts = [
            b"",
            b"{",
            b"[1]",
            b"\xff\xfe{}",
            deep.encode(),
            f'{{"prompt": {deep}, "inputs": 1, "input": {{}}, "messages": {deep}}}'.encode(),
            b'{"prompt": 3, "input": 3, "messages": 3, "inputs": 3}',
        ]
        paths = ["/v1/generate", "/v1/completions", "/v1/chat/completions", "/v1/classify", "/generate", "/generate_stream"]
        path, text = self.random.choice(paths), self.random.choice(texts)
        return await self._refused(path, text, 400)

    async def names_no_adapter(self):
        name = f"nobody-{self.random.randrange(10**9)}"
        path = self.random.choice(["/v1/generate", "/v1/completions"])
        return await self._refused(path, json.dumps({"adapter": name, "model": name, "prompt": "Hello"}).encode(), 404)

    async def asks_for_too_much(self):
        body = self.random.choice(
            [
                {"prompt": "the " * 9000},
                {"prompt": "x", "max_tokens": 10**10},
                {"prompt": "x", "guided_json": {"type": "frobnicate"}},
                {"prompt": "x", "guided_regex": "(" * 500},
                {"prompt": "x", "logprobs": 10**6},
            ]
        )
        return await self._refused("/v1/generate", json.dumps(body).encode(), 400)

    async def sends_a_huge_body(self):
        """A byte more than the server reads. One at a time: how much memory is kept for the next depends on their number."""
        start = b'{"prompt": "'
        async with self.huge:
            return await self._refused("/v1/generate", start + b"x" * (MAX_BODY + 1 - len(start)), 413)

    async def leaves_an_upload(self):
        name = self.random.choice(self.traffic.changing)
        head = {"content-type": "multipart/form-data; boundary=b"}
        part = b'--b\r\ncontent-disposition: form-data; name="weights"; filename="w"\r\n\r\n'
        _, writer = await self.client.connect()
        sent = part + self.random.randbytes(100_000)
        writer.write(message("PUT", f"/v1/adapters/{name}", sent, head, length=2_000_000))
        await asyncio.sleep(self.random.uniform(0, 2))
        self._leave(writer)
        return "left"

    async def takes_a_wrong_way(self):
        method, path, status = self.random.choice([("GET", "/v1/nothing", 404), ("DELETE", "/v1/generate", 405)])
        return await self._refused(path, b"", status, method=method)


class Changes:
    """Uploads, replacements and removals of names that nobody else changes, one after the other."""

    def __init__(self, traffic, client, names, files):
        self.traffic, self.client, self.random = traffic, client, traffic.random
        self.names = names
        self.files = files  # Of each original: {field: bytes}.
        self.there = {}  # What each name stands for: (original, generation).

    async def one(self):
        """Makes one change, looks whether it holds, and says which it was. Raises `Wrong`."""
        name = self.random.choice(self.names)
        (what,) = self.random.choices(["upload", "removal", "broken upload", "late upload"], [5, 2, 2, 1])
        if what == "removal" and name not in self.there:
            what = "upload"
        if what == "upload":
            await self._upload(name)
        elif what == "removal":
            got = await self.client.ask("DELETE", f"/v1/adapters/{name}")
            require(got.status == 200, f"DELETE {name}: {got.status} {got.body[:200]}")
            del self.there[name]
        elif what == "broken upload":
            got = await self._put(name, cut=self.random.randrange(1, 100_000))
            require(got.status == 422, f"a broken upload: {got.status} {got.body[:200]}")
        else:
            got = await self._put(name, headers={"if-match": '"0123abcd"'})
            require(got.status in (404, 409), f"an upload in place of another generation: {got.status} {got.body[:200]}")
        await self.holds(name)
        return what

    async def _put(self, name, cut=0, headers=(), original=None):
        original = original or self.random.choice(list(self.files))
        files = dict(self.files[original])
        # A generation that was not there before.
        config = {**json.loads(files["config"]), "revision": f"upload {self.random.getrandbits(64)}"}
        files["config"] = json.dumps(config).encode()
        files["weights"] = files["weights"][: len(files["weights"]) - cut]
        parts = []
        for field, content in files.items():
            head = f'--part\r\ncontent-disposition: form-data; name="{field}"; filename="{field}"\r\n\r\n'
            parts += [head.encode(), content, b"\r\n"]
        headers = {"content-type": "multipart/form-data; boundary=part", **dict(headers)}
        return await self.client.ask("PUT", f"/v1/adapters/{name}", b"".join([*parts, b"--part--\r\n"]), headers)

    async def _upload(self, name):
        original = self.random.choice(list(self.files))
        got = await self._put(name, original=original)
        require(got.status == (200 if name in self.there else 201), f"PUT {name}: {got.status} {got.body[:200]}")
        self.there[name] = (original, got.json()["generation"])

    async def holds(self, name):
        """That the name stands for what it was last made to."""
        number = self.random.randrange(len(PROMPTS))
        path, body = PROBES[number]
        for _ in range(200):
            got = await self.client.post(path, {**body, "adapter": name})
            if got.status not in (429, 503):
                break
            await asyncio.sleep(0.2)
        if name not in self.there:
            return require(got.status == 404, f"{name} was removed, and answers {got.status} {got.body[:200]}")
        original, generation = self.there[name]
        require(got.status == 200, f"{name} was uploaded, and answers {got.status} {got.body[:200]}")
        require(got.json()["generation"] == generation, f"{name} is not of generation {generation}: {got.body[:300]}")
        expected = self.traffic.expected[original, number]
        require(said(got) == expected, f"{name} says {said(got)}; {original} says {expected}")
