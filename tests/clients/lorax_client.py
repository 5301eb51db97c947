"""The LoRAX client against a running server: generate, stream, adapter_id, errors."""

import json
import sys

from lorax import Client
from lorax.errors import NotFoundError
from lorax.types import MergedAdapters

URL, ADAPTER = sys.argv[1:3]
client = Client(URL, timeout=120)
prompt = "The review said the novel was"

base = client.generate(prompt, max_new_tokens=12)
assert base.details.generated_tokens == 12 and base.details.finish_reason == "length", base
assert "".join(t.text for t in base.details.tokens) == base.generated_text
adapted = client.generate(prompt, adapter_id=ADAPTER, max_new_tokens=12)
assert adapted.generated_text != base.generated_text, "the adapter changes nothing"
for name in ["", "__base_model__"]:
    assert client.generate(prompt, adapter_id=name, max_new_tokens=12).generated_text == base.generated_text, name
# Nor is anything sampled at temperature 0, whatever else is asked for.
cold = client.generate(prompt, do_sample=True, temperature=0, top_k=5, seed=3, max_new_tokens=12)
assert cold.generated_text == base.generated_text, cold
# What has no effect does not turn sampling on.
assert client.generate(prompt, temperature=1.0, max_new_tokens=12).generated_text == base.generated_text

streamed, last = "", None
for response in client.generate_stream(prompt, adapter_id=ADAPTER, max_new_tokens=12):
    if not response.token.special:
        streamed += response.token.text
    last = response
assert streamed == adapted.generated_text == last.generated_text, (streamed, adapted.generated_text)
assert last.details.generated_tokens == 12

sampled = [client.generate(prompt, do_sample=True, temperature=0.9, seed=3, max_new_tokens=8) for _ in range(2)]
assert sampled[0].generated_text == sampled[1].generated_text
hot = {client.generate(prompt, temperature=2.0, seed=s, max_new_tokens=8).generated_text for s in range(4)}
assert len(hot) > 1, "temperature has no effect"
full = client.generate(prompt, max_new_tokens=4, return_full_text=True)
assert full.generated_text.startswith(prompt)
stop = base.generated_text[3:6]
stopped = client.generate(prompt, max_new_tokens=12, stop_sequences=[stop])
assert stopped.details.finish_reason == "stop_sequence", stopped

# JSON of a schema, as a stream and whole.
answer = {"type": "object", "properties": {"good": {"type": "boolean"}, "stars": {"type": "integer", "minimum": 1,
          "maximum": 5}}, "required": ["good", "stars"], "additionalProperties": False}
form = {"type": "json_object", "schema": answer}
formed = client.generate(prompt, adapter_id=ADAPTER, response_format=form, max_new_tokens=400)
value = json.loads(formed.generated_text)
assert isinstance(value["good"], bool) and value["stars"] in range(1, 6) and len(value) == 2, value
streamed = list(client.generate_stream(prompt, adapter_id=ADAPTER, response_format=form, max_new_tokens=400))
assert streamed[-1].generated_text == formed.generated_text, streamed

# Several adapters as one. With a weight of nearly nothing the base is left.
whole = MergedAdapters(ids=[ADAPTER], weights=[1.0], density=0.0)
merged = client.generate(prompt, merged_adapters=whole, max_new_tokens=12)
assert merged.generated_text == adapted.generated_text, merged
ties = MergedAdapters(ids=[ADAPTER, ADAPTER], weights=[1e-6, 1e-6], merge_strategy="ties", density=0.5)
merged = client.generate(prompt, merged_adapters=ties, max_new_tokens=12)
assert merged.generated_text == base.generated_text, merged

try:
    client.generate(prompt, adapter_id="no-such")
    raise AssertionError("an unknown adapter was answered")
except NotFoundError as e:
    assert "no-such" in str(e), e
print("ok")
