"""The `ollama` package against a running server: chat, tools, generate, gaps, what there is, errors."""

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



def weather(city: str) -> str:
    """Says how it will be.

    Args:
        city: Where.
    """
    return f"sunny in {city}"


offered = client.chat(model=model, messages=question, tools=[weather], options=exact)
assert offered.prompt_eval_count > answer.prompt_eval_count, offered
call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
history = [
    *question,
    {"role": "assistant", "content": "", "tool_calls": [call]},
    {"role": "tool", "tool_name": "weather", "content": weather("Rome")},
]
after = list(client.chat(model=model, messages=history, tools=[weather], think=False, options=exact, stream=True))
assert after[-1].done and after[-1].prompt_eval_count > offered.prompt_eval_count, after[-1]

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
