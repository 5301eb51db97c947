"""vLLM's calls: load, use, replace in place, unload; tokenize and detokenize."""

import json
import sys
import urllib.error
import urllib.request

URL, DIRECTORY, OTHER = sys.argv[1:4]


def post(path, body):
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            text, status = answer.read().decode(), answer.status
    except urllib.error.HTTPError as e:
        text, status = e.read().decode(), e.code
    try:
        return status, json.loads(text)
    except json.JSONDecodeError:
        return status, text


def complete():
    return post("/v1/completions", {"model": "loaded", "prompt": "A house", "max_tokens": 8, "temperature": 0})


assert complete()[0] == 404
status, text = post("/v1/load_lora_adapter", {"lora_name": "loaded", "lora_path": DIRECTORY})
assert status == 200 and "loaded" in text, (status, text)
first = complete()
assert first[0] == 200, first
status, body = post("/v1/load_lora_adapter", {"lora_name": "loaded", "lora_path": OTHER})
assert status in (400, 409) and "loaded" in body["error"]["message"], (status, body)
status, _ = post("/v1/load_lora_adapter", {"lora_name": "loaded", "lora_path": OTHER, "load_inplace": True})
assert status == 200
assert complete()[1]["choices"][0]["text"] != first[1]["choices"][0]["text"]
status, _ = post("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": "/does/not/exist"})
assert 400 <= status < 500, status
assert post("/v1/unload_lora_adapter", {"lora_name": "loaded"})[0] == 200
assert complete()[0] == 404
assert post("/v1/unload_lora_adapter", {"lora_name": "loaded"})[0] == 404

status, body = post("/tokenize", {"model": "base", "prompt": "The capital of France is"})
assert status == 200 and body["tokens"] == [504, 3575, 282, 4649, 314] and body["count"] == 5, body
assert body["max_model_len"] == 8192, body
assert post("/detokenize", {"tokens": body["tokens"]})[1]["prompt"] == "The capital of France is"
print("ok")
