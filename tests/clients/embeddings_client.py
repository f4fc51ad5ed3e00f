"""The `openai` package's embeddings against a running server with real weights, beside what sentence-transformers answers."""

import json
import math
import struct
import sys
from pathlib import Path

import openai

LEAST_COSINE = 0.9999

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
names = [model.id for model in client.models.list().data]
assert names == ["quire-demo", "minilm"], names
expected = json.loads(Path(__file__).with_name("minilm_vectors.json").read_text())
texts, vectors = expected["texts"], expected["vectors"]


def cosine(a, b):
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


# The package asks for base64 by itself, and decodes it.
answer = client.embeddings.create(model="minilm", input=texts)
found = [entry.embedding for entry in answer.data]
cosines = [cosine(a, b) for a, b in zip(found, vectors, strict=True)]
assert min(cosines) > LEAST_COSINE, cosines
assert answer.usage.prompt_tokens == answer.usage.total_tokens > len(texts), answer.usage

as_floats = client.embeddings.create(model="minilm", input=texts[0], encoding_format="float").data[0].embedding
packed = [struct.pack(f"{len(vector)}f", *vector) for vector in (as_floats, found[0])]
assert packed[0] == packed[1], "the same bits alone and in a batch, written out and in base64"
short = client.embeddings.create(model="minilm", input=texts[0], dimensions=128).data[0].embedding
assert len(short) == 128 and cosine(short, found[0][:128]) > 0.999999, short
chat = client.chat.completions.create(model="quire-demo", messages=[{"role": "user", "content": "What is 7 + 5?"}])
assert chat.choices[0].message.content, chat

for wrong, error in [
    ({"model": "quire-demo"}, openai.BadRequestError),
    ({"model": "no-such-model"}, openai.NotFoundError),
    ({"input": []}, openai.BadRequestError),
    ({"dimensions": 1000}, openai.BadRequestError),
    ({"input": "word " * 1000}, openai.BadRequestError),
]:
    try:
        client.embeddings.create(**{"model": "minilm", "input": "word", **wrong})
        raise AssertionError(f"{wrong} was served")
    except error:
        pass
print(f"embeddings of all-MiniLM-L6-v2: cosine to sentence-transformers at least {min(cosines):.7f}")
