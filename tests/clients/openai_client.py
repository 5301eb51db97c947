"""The OpenAI client against a running server: models, completions, chat, streams, errors."""

import sys

import openai

URL, ADAPTER = sys.argv[1:3]
client = openai.OpenAI(base_url=URL + "/v1", api_key="none", max_retries=0)
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

ids = [m.id for m in client.models.list()]
assert BASE in ids and ADAPTER in ids, ids
assert client.models.retrieve(ADAPTER).id == ADAPTER
assert client.models.retrieve(BASE).id == BASE

prompt = "The capital of France is"
whole = client.completions.create(model=ADAPTER, prompt=prompt, max_tokens=12, temperature=0, logprobs=3)
choice = whole.choices[0]
assert whole.usage.completion_tokens == 12 and choice.finish_reason == "length", whole
assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 12
assert "".join(choice.logprobs.tokens) == choice.text
for token, logprob, top in zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs):
    assert logprob <= 0 and abs(max(top.values()) - logprob) < 1e-4, (token, logprob, top)

parts, usage = [], None
for chunk in client.completions.create(
    model=ADAPTER, prompt=prompt, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
):
    parts += [c.text for c in chunk.choices]
    usage = chunk.usage or usage
assert "".join(parts) == choice.text and len(parts) > 2, parts
assert usage.completion_tokens == 12

base = client.completions.create(model="base", prompt=prompt, max_tokens=12, temperature=0)
assert base.choices[0].text == client.completions.create(
    model=BASE, prompt=prompt, max_tokens=12, temperature=0).choices[0].text
assert base.choices[0].text != choice.text, "the adapter changes nothing"

several = client.completions.create(model=ADAPTER, prompt=[prompt, "Once upon a time"], n=2, max_tokens=8, seed=7)
assert [c.index for c in several.choices] == [0, 1, 2, 3]
again = client.completions.create(model=ADAPTER, prompt=[prompt, "Once upon a time"], n=2, max_tokens=8, seed=7)
assert [c.text for c in several.choices] == [c.text for c in again.choices]
assert several.choices[0].text != several.choices[1].text

echo = client.completions.create(model=ADAPTER, prompt=prompt, max_tokens=2, temperature=0, echo=True)
assert echo.choices[0].text.startswith(prompt)
ids = client.completions.create(model=ADAPTER, prompt=[504, 3575, 282, 4649, 314], max_tokens=12, temperature=0)
assert ids.choices[0].text == choice.text

stop = choice.text[3:6]
stopped = client.completions.create(model=ADAPTER, prompt=prompt, max_tokens=12, temperature=0, stop=stop)
assert stopped.choices[0].text == choice.text[: choice.text.index(stop)] and stopped.choices[0].finish_reason == "stop"

messages = [{"role": "user", "content": "Write one sentence about autumn."}]
chat = client.chat.completions.create(
    model="base", messages=messages, max_tokens=16, temperature=0, logprobs=True, top_logprobs=2)
message = chat.choices[0].message
assert message.role == "assistant" and message.content, chat
for entry in chat.choices[0].logprobs.content:
    assert bytes(entry.bytes).decode("utf8", "replace") == entry.token and len(entry.top_logprobs) == 2
deltas, role = [], None
for chunk in client.chat.completions.create(
    model="base", messages=messages, max_completion_tokens=16, temperature=0, stream=True
):
    for c in chunk.choices:
        role = c.delta.role or role
        deltas.append(c.delta.content or "")
assert "".join(deltas) == message.content and role == "assistant", deltas
parts = [{"role": "user", "content": [{"type": "text", "text": "Write one sentence about autumn."}]}]
assert client.chat.completions.create(
    model="base", messages=parts, max_tokens=16, temperature=0).choices[0].message.content == message.content


def fails(error, call, *words):
    try:
        call()
    except error as e:
        assert all(w in str(e) for w in words), (words, str(e))
        return e
    raise AssertionError(f"{error.__name__} was expected")


create = client.completions.create
e = fails(openai.NotFoundError, lambda: create(model="no-such", prompt="x"), "no-such")
assert e.code == "model_not_found", e.code
fails(openai.NotFoundError, lambda: client.models.retrieve("no-such"))
fails(openai.BadRequestError, lambda: create(model="base", prompt="x", temperature=-1), "temperature")
fails(openai.BadRequestError, lambda: create(model="base", prompt="x", max_tokens=-5), "max_tokens")
fails(openai.BadRequestError, lambda: create(model="base", prompt="word " * 9000), "8192")
fails(openai.BadRequestError, lambda: client.chat.completions.create(
    model="base", messages=messages, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]), "tools")
fails(openai.BadRequestError, lambda: client.chat.completions.create(model="base", messages=[]), "messages")
print("ok")
