"""TGI's own client against a running server: generate, generate_stream, errors."""

import sys

from text_generation import Client
from text_generation.errors import ValidationError
from text_generation.types import Grammar, GrammarType

URL = sys.argv[1]
client = Client(URL, timeout=120)
prompt = "The review said the novel was"

whole = client.generate(prompt, max_new_tokens=12, decoder_input_details=True)
assert whole.details.generated_tokens == 12 and whole.details.finish_reason == "length", whole
assert "".join(t.text for t in whole.details.tokens) == whole.generated_text
assert "".join(t.text for t in whole.details.prefill) == prompt, whole.details.prefill
streamed = list(client.generate_stream(prompt, max_new_tokens=12))
assert "".join(r.token.text for r in streamed) == streamed[-1].generated_text == whole.generated_text
assert [r.token.id for r in streamed] == [t.id for t in whole.details.tokens]
assert streamed[-1].details.generated_tokens == 12 and all(r.generated_text is None for r in streamed[:-1])

# Nothing that has no effect turns sampling on.
neutral = client.generate(prompt, max_new_tokens=12, temperature=1.0)
assert neutral.generated_text == whole.generated_text and neutral.details.seed is None
seeded = client.generate(prompt, max_new_tokens=8, do_sample=True, temperature=0.9, seed=5)
assert seeded.details.seed == 5, seeded.details
# As LangChain's HuggingFaceEndpoint asks unless it is told otherwise.
typical = [client.generate(prompt, max_new_tokens=8, top_p=0.95, typical_p=0.95, temperature=0.8, seed=5) for _ in range(2)]
assert typical[0].generated_text == typical[1].generated_text, typical
year = Grammar(type=GrammarType.Regex, value="(18|19)[0-9]{2}")
written = client.generate(prompt, max_new_tokens=20, grammar=year).generated_text
assert len(written) == 4 and written[:2] in ["18", "19"] and written.isdigit(), written
try:
    client.generate("word " * 9000)
    raise AssertionError("a prompt longer than the context was answered")
except ValidationError as e:
    assert "8192" in str(e), e
print("ok")
