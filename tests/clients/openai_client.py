"""The OpenAI client against a running server: models, completions, chat, streams, errors."""

import json
import sys
from typing import List, Literal

import openai
import pydantic

URL, ADAPTER = sys.argv[1:3]
client = openai.OpenAI(base_url=URL + "/v1", api_key="none", max_retries=0)
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

ids = [m.id for m in client.models.list()]
assert BASE in ids and ADAPTER in ids, ids
assert client.models.retrieve(ADAPTER).id == ADAPTER
assert client.models.retrieve(BASE).id == BASE

prompt = "The review said the novel was"
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

scored = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
for chunk in client.completions.create(
    model=ADAPTER, prompt=prompt, max_tokens=12, temperature=0, logprobs=3, stream=True
):
    for c in chunk.choices:
        for key, list in scored.items():
            list += getattr(c.logprobs, key)
assert scored == {key: getattr(choice.logprobs, key) for key in scored}, scored

# Characters of several tokens: whole in the text; their tokens are spelled as bytes, no two alike.
party = "🎉🎉🎉🎉🎉🎉"
emoji = client.completions.create(model="base", prompt=party, max_tokens=12, temperature=0, logprobs=5).choices[0]
spelled = [t for t in emoji.logprobs.tokens if t.startswith("bytes:")]
assert "🎉" in emoji.text and spelled, emoji


def token_bytes(token):
    return bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()


joined = b"".join(token_bytes(t) for t in emoji.logprobs.tokens)
assert joined.decode("utf8", "replace") == emoji.text, (joined, emoji.text)
assert all(len(top) == 5 for top in emoji.logprobs.top_logprobs), emoji.logprobs.top_logprobs
for token, offset in zip(emoji.logprobs.tokens, emoji.logprobs.text_offset):
    assert token.startswith("bytes:") or emoji.text[offset:].startswith(token), (token, offset, emoji.text)
parts = [c.text for chunk in client.completions.create(
    model="base", prompt=party, max_tokens=12, temperature=0, stream=True) for c in chunk.choices]
assert "".join(parts) == emoji.text, parts

base = client.completions.create(model="base", prompt=prompt, max_tokens=12, temperature=0)
assert base.choices[0].text == client.completions.create(
    model=BASE, prompt=prompt, max_tokens=12, temperature=0).choices[0].text
nameless = client.completions.create(model="", prompt=prompt, max_tokens=12, temperature=0)
assert (nameless.model, nameless.choices[0].text) == (BASE, base.choices[0].text), nameless
assert base.choices[0].text != choice.text, "the adapter changes nothing"

several = client.completions.create(model=ADAPTER, prompt=[prompt, "Once upon a time"], n=2, max_tokens=8, seed=7)
assert [c.index for c in several.choices] == [0, 1, 2, 3]
again = client.completions.create(model=ADAPTER, prompt=[prompt, "Once upon a time"], n=2, max_tokens=8, seed=7)
assert [c.text for c in several.choices] == [c.text for c in again.choices]
assert several.choices[0].text != several.choices[1].text
streams = {}
for chunk in client.completions.create(
    model=ADAPTER, prompt=[prompt, "Once upon a time"], n=2, max_tokens=8, seed=7, stream=True
):
    for c in chunk.choices:
        streams[c.index] = streams.get(c.index, "") + c.text
assert [streams[i] for i in range(4)] == [c.text for c in several.choices], streams

echo = client.completions.create(model=ADAPTER, prompt=prompt, max_tokens=2, temperature=0, echo=True)
assert echo.choices[0].text.startswith(prompt)
turn = "<|im_start|>user\nHi<|im_end|>\n"
turns = client.completions.create(model=ADAPTER, prompt=[prompt, turn], max_tokens=2, temperature=0, echo=True)
assert [c.text.startswith(p) for c, p in zip(turns.choices, [prompt, turn])] == [True, True], turns
# As evaluation harnesses read it: the log-probability of what follows, and whether the model would have said it.
said = client.completions.create(model=ADAPTER, prompt=prompt, max_tokens=12, temperature=0, logprobs=3).choices[0]
ask = [prompt + said.text, prompt + " zebra"]
echoes = client.completions.create(model=ADAPTER, prompt=ask, max_tokens=1, temperature=0, echo=True, logprobs=1)
for c, text in zip(echoes.choices, ask):
    found = c.logprobs
    assert c.text.startswith(text) and "".join(found.tokens[:-1]) == text, c
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None, found
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert [c.text[o:o + len(t)] for o, t in zip(found.text_offset, found.tokens)] == found.tokens, found
    assert all(top[t] == l for t, l, top in zip(found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:]))
continued = [c.logprobs.token_logprobs[-len(said.logprobs.tokens) - 1:-1] for c in echoes.choices]
assert all(abs(a - b) < 1e-3 for a, b in zip(continued[0], said.logprobs.token_logprobs)), (continued, said)
likeliest = [[l == max(top.values()) for l, top in zip(c.logprobs.token_logprobs[1:-1], c.logprobs.top_logprobs[1:-1])]
             for c in echoes.choices]
assert all(likeliest[0][-len(said.logprobs.tokens):]) and not all(likeliest[1]), likeliest
as_ids = client.completions.create(model=ADAPTER, prompt=[504, 3575, 282, 4649, 314], max_tokens=12, temperature=0)
as_text = client.completions.create(model=ADAPTER, prompt="The capital of France is", max_tokens=12, temperature=0)
assert as_ids.choices[0].text == as_text.choices[0].text

stop = choice.text[3:6]
stopped = client.completions.create(model=ADAPTER, prompt=prompt, max_tokens=12, temperature=0, stop=stop)
assert stopped.choices[0].text == choice.text[: choice.text.index(stop)] and stopped.choices[0].finish_reason == "stop"

assert stopped.choices[0].stop_reason == stop, stopped
end = client.completions.create(
    model="base", prompt="x", logit_bias={"504": 100}, max_tokens=4, temperature=0, extra_body={"stop_token_ids": [504]})
assert end.choices[0].stop_reason == 504 and end.choices[0].text == "", end
later = client.completions.create(
    model="base", prompt="x", logit_bias={"504": 100}, max_tokens=4, temperature=0,
    extra_body={"stop_token_ids": [504], "min_tokens": 2})
assert later.choices[0].stop_reason == 504 and later.usage.completion_tokens == 3, later

messages = [{"role": "user", "content": "Write one sentence about autumn."}]
chat = client.chat.completions.create(
    model="base", messages=messages, max_tokens=16, temperature=0, logprobs=True, top_logprobs=2)
message = chat.choices[0].message
assert message.role == "assistant" and message.content, chat
for entry in chat.choices[0].logprobs.content:
    assert bytes(entry.bytes).decode("utf8", "replace") == entry.token and len(entry.top_logprobs) == 2
assert chat.choices[0].stop_reason is None, chat
deltas, role = [], None
for chunk in client.chat.completions.create(
    model="base", messages=messages, max_completion_tokens=16, temperature=0, stream=True
):
    for c in chunk.choices:
        role = c.delta.role or role
        deltas.append(c.delta.content or "")
assert "".join(deltas) == message.content and role == "assistant", deltas
whole = client.chat.completions.create(model="base", messages=messages, max_tokens=8, n=2, seed=3, logprobs=True)
streams, entries = {}, {0: [], 1: []}
for chunk in client.chat.completions.create(
    model="base", messages=messages, max_tokens=8, n=2, seed=3, logprobs=True, stream=True
):
    for c in chunk.choices:
        streams[c.index] = streams.get(c.index, "") + (c.delta.content or "")
        entries[c.index] += (c.logprobs and c.logprobs.content) or []
for c in whole.choices:
    assert streams[c.index] == c.message.content and entries[c.index] == c.logprobs.content, (streams, whole)
bare = client.chat.completions.create(
    model="base", messages=messages, max_tokens=4, temperature=0, extra_body={"add_generation_prompt": False})
assert bare.usage.prompt_tokens < chat.usage.prompt_tokens
parts = [{"role": "user", "content": [{"type": "text", "text": "Write one sentence about autumn."}]}]
assert client.chat.completions.create(
    model="base", messages=parts, max_tokens=16, temperature=0).choices[0].message.content == message.content


# Structured output: a model of pydantic's as the client sends it, its JSON schema, a stream; sampled by base and adapter.
class Pet(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=20)
    kind: Literal["cat", "dog"]
    age: int = pydantic.Field(ge=0, le=30)
    friends: List[Literal["bird", "fish"]] = pydantic.Field(max_length=2)


pets = [{"role": "user", "content": "Describe a pet as JSON."}]
for model in ["base", ADAPTER]:
    parsed = client.chat.completions.parse(
        model=model, messages=pets, response_format=Pet, temperature=1, seed=2, max_tokens=400)
    pet = parsed.choices[0].message.parsed
    assert isinstance(pet, Pet) and parsed.choices[0].finish_reason == "stop", parsed
named = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": Pet.model_json_schema()}}
formed = client.chat.completions.create(
    model="base", messages=pets, response_format=named, temperature=1, seed=5, max_tokens=400, n=2)
for c in formed.choices:
    Pet.model_validate_json(c.message.content)
texts = {}
for chunk in client.chat.completions.create(
    model="base", messages=pets, response_format=named, temperature=1, seed=5, max_tokens=400, n=2, stream=True
):
    for c in chunk.choices:
        texts[c.index] = texts.get(c.index, "") + (c.delta.content or "")
assert texts == {c.index: c.message.content for c in formed.choices}, texts
with client.chat.completions.stream(
    model="base", messages=pets, response_format=Pet, temperature=1, seed=5, max_tokens=400
) as stream:
    final = stream.get_final_completion().choices[0].message
assert final.content == texts[0] and isinstance(final.parsed, Pet), final
any_object = client.chat.completions.create(
    model="base", messages=pets, response_format={"type": "json_object"}, temperature=0, max_tokens=60).choices[0]
assert any_object.finish_reason == "length" or isinstance(json.loads(any_object.message.content), dict), any_object
answer = client.completions.create(
    model=ADAPTER, prompt="Is water wet?", temperature=0, extra_body={"guided_choice": ["yes", "no"]}).choices[0]
assert answer.text in ["yes", "no"] and answer.finish_reason == "stop", answer


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
e = fails(openai.BadRequestError, lambda: client.chat.completions.create(
    model="base", messages=messages,
    response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strnig"}}}), "strnig")
assert e.param == "response_format.json_schema.schema", e.param
print("ok")
