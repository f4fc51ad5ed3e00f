"""The `ollama` package against a running server: chat, generate, gaps, what there is, errors."""

import importlib.metadata
import sys

import ollama

client = ollama.Client(host=sys.argv[1])
model = client.list().models[0].model
question = [{"role": "user", "content": "What is 7 + 5?"}]
exact = {"temperature": 0}

answer = client.chat(model=model, messages=question, options=exact)
assert answer.message.content and answer.done and answer.done_reason == "stop", answer
parts = list(client.chat(model=model, messages=question, options=exact, stream=True))
assert "".join(part.message.content for part in parts) == answer.message.content
assert [part.done for part in parts].count(True) == 1 and parts[-1].eval_count == answer.eval_count

generated = client.generate(model=model, prompt="What is 7 + 5?", options=exact)
assert generated.response == answer.message.content, generated
gap = client.generate(model=model, prompt="Once upon a time", suffix="The end.", options={"num_predict": 8})
assert gap.done, gap
shown = client.show(model)
assert "completion" in shown.capabilities, shown
assert client.ps().models[0].model == model
try:
    client.chat(model="no-such-model", messages=question)
    raise AssertionError("an unknown model was served")
except ollama.ResponseError as error:
    assert error.status_code == 404, error
print("ollama", importlib.metadata.version("ollama"), "fine")
