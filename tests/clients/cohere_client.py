"""The `cohere` package's embeddings and reranking against a running server with tiny models, and labels beside what transformers
answers."""

import json
import sys
import urllib.request
from pathlib import Path

import cohere

TOLERANCE = 1e-4

http = sys.argv[1]
fixtures = Path(__file__).parent.parent / "fixtures" / "embedders"


def expected(name):
    return json.loads((fixtures / name / "expected.json").read_text())


def near(found, wanted):
    assert len(found) == len(wanted), (found, wanted)
    assert all(abs(a - b) < TOLERANCE for a, b in zip(found, wanted, strict=True)), (found, wanted)


client = cohere.ClientV2(api_key="none", base_url=http)
vectors = expected("bert-mean")
answer = client.embed(
    model="embed",
    texts=vectors["texts"],
    input_type="search_document",
    embedding_types=["float", "binary", "ubinary", "base64"],
)
for found, wanted in zip(answer.embeddings.float_, vectors["vectors"], strict=True):
    near(found, wanted)
bits = [[signed + 128 for signed in vector] for vector in answer.embeddings.binary]
assert bits == answer.embeddings.ubinary, answer.embeddings
assert [vector[0] >= 128 for vector in bits] == [vector[0] >= 0 for vector in vectors["vectors"]], bits
assert answer.meta.billed_units.input_tokens == sum(len(ids) for ids in vectors["token_ids"]), answer.meta
assert answer.texts == vectors["texts"], answer.texts

pairs = expected("bert-rerank")
query, documents = pairs["pairs"][0][0], [pairs["pairs"][0][1], pairs["pairs"][1][1]]
ranked = client.rerank(model="rerank", query=query, documents=documents).results
assert sorted(result.index for result in ranked) == [0, 1], ranked
assert ranked[0].relevance_score >= ranked[1].relevance_score, ranked
for result in ranked:
    near([result.relevance_score], [pairs["scores"][result.index]])

try:
    client.embed(model="embed", texts=["a"], input_type="search_document", embedding_types=["int8"])
    raise AssertionError("int8 was served")
except cohere.BadRequestError as error:
    assert "embedding_types" in str(error), error


def post(path, body):
    request = urllib.request.Request(f"{http}{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


labels = expected("bert-classify")
classified = post("/classify", {"model": "classify", "input": labels["texts"]})
pooled = post("/pooling", {"model": "classify", "input": labels["texts"]})
for entry, same, wanted in zip(classified["data"], pooled["data"], labels["probs"], strict=True):
    near(entry["probs"], wanted)
    assert same["data"] == entry["probs"], same
    assert entry["label"] == labels["labels"][wanted.index(max(wanted))], entry
    assert entry["num_classes"] == len(labels["labels"]), entry
print(f"cohere {cohere.__version__}: embeddings, reranking, and labels of transformers")
