"""The `openai` package against a running server: chat, streams, tools, completions with a suffix, responses, errors."""

import json
import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id
question = [{"role": "user", "content": "What is 7 + 5?"}]

answer = client.chat.completions.create(model=model, messages=question, temperature=0, logprobs=True, top_logprobs=2)
text = answer.choices[0].message.content
assert text and answer.usage.completion_tokens > 0, answer
assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2, answer

stream = client.chat.completions.create(
    model=model, messages=question, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens

gap = client.completions.create(model=model, prompt="Once upon a time", suffix="The end.", max_tokens=8)
assert gap.choices[0].finish_reason in ("stop", "length"), gap

response = client.responses.create(model=model, input="What is 7 + 5?", temperature=0)
assert response.output_text and response.status == "completed", response
assert client.responses.retrieve(response.id).output_text == response.output_text
following = client.responses.create(model=model, input="And 1 + 1?", previous_response_id=response.id, max_output_tokens=16)
assert following.usage.input_tokens > response.usage.input_tokens, following
client.responses.delete(response.id)
try:
    client.responses.retrieve(response.id)
    raise AssertionError("a deleted response was found")
except openai.NotFoundError:
    pass
with client.responses.stream(model=model, input="What is 7 + 5?", temperature=0) as stream:
    kinds = [event.type for event in stream]
    assert stream.get_final_response().output_text == response.output_text
assert kinds.count("response.completed") == 1 and "response.output_text.delta" in kinds, kinds

waiting = client.responses.create(model=model, input="Tell me a story.", background=True, max_output_tokens=32)
assert waiting.status == "queued", waiting
assert client.responses.cancel(waiting.id).status in ("cancelled", "completed", "incomplete")

parameters = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def check_call(name, arguments):
    arguments = json.loads(arguments)
    assert name == "weather" and arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 7, arguments


described = {"name": "weather", "description": "Says how it will be.", "parameters": parameters}
called = client.chat.completions.create(
    model=model, messages=question, tools=[{"type": "function", "function": described}], tool_choice="required",
    parallel_tool_calls=False, temperature=0, max_tokens=200,
)
call = called.choices[0].message.tool_calls[0].function
assert called.choices[0].finish_reason == "tool_calls", called
check_call(call.name, call.arguments)

flat = {
    "model": model, "tools": [{"type": "function", "strict": True, **described}], "parallel_tool_calls": False,
    "tool_choice": {"type": "function", "name": "weather"}, "temperature": 0, "max_output_tokens": 200,
}
called = client.responses.create(input="How is Rome?", **flat)
(call,) = called.output
check_call(call.name, call.arguments)
with client.responses.stream(input="How is Rome?", **flat) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_response()
assert final.output[0].arguments == call.arguments, (final, call)
assert kinds.count("response.function_call_arguments.done") == kinds.count("response.completed") == 1, kinds
result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
after = client.responses.create(
    model=model, previous_response_id=called.id, input=[result], tools=flat["tools"], max_output_tokens=16
)
again = client.responses.create(
    model=model, input=[{"role": "user", "content": "How is Rome?"}, *called.output, result], tools=flat["tools"],
    max_output_tokens=16,
)
assert after.usage.input_tokens == again.usage.input_tokens > called.usage.input_tokens, (after.usage, again.usage)

for wrong, error in [
    ({"temperature": 9}, openai.BadRequestError),
    ({"model": "no-such-model"}, openai.NotFoundError),
    ({"extra_body": {"use_beam_search": True}}, openai.BadRequestError),
]:
    try:
        client.chat.completions.create(**{"model": model, "messages": question, **wrong})
        raise AssertionError(f"{wrong} was served")
    except error:
        pass
print("openai", openai.__version__, "fine")
