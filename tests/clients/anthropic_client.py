"""The `anthropic` package against a running server: messages, streams, tools, counting, errors."""

import json
import sys
import urllib.request

import anthropic

with urllib.request.urlopen(f"{sys.argv[1]}/v1/models") as models:
    model = json.load(models)["data"][0]["id"]
client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
exact = {"extra_body": {"temperature": 0}}
question = [{"role": "user", "content": "What is 7 + 5?"}]

message = client.messages.create(model=model, max_tokens=64, messages=question, system="Be brief.", **exact)
text = message.content[0].text
assert text and message.stop_reason == "end_turn", message
counted = client.messages.count_tokens(model=model, messages=question, system="Be brief.").input_tokens
assert counted == message.usage.input_tokens + message.usage.cache_read_input_tokens, (counted, message.usage)

with client.messages.stream(
    model=model, max_tokens=64, messages=question, system="Be brief.", **exact
) as stream:
    assert "".join(stream.text_stream) == text
    final = stream.get_final_message()
assert final.stop_reason == "end_turn" and final.usage.output_tokens == message.usage.output_tokens, final

tool = {
    "name": "weather",
    "description": "Says how it will be.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
wanted = {
    "model": model, "max_tokens": 200, "messages": question, "tools": [tool],
    "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}, **exact,
}
called = client.messages.create(**wanted)
(use,) = called.content
assert called.stop_reason == use.type == "tool_use" and use.input["city"] in ("Rome", "Oslo"), called
with client.messages.stream(**wanted) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_message()
assert final.content[0].input == use.input and "input_json" in kinds, (final, kinds)
result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}]}
history = [*question, {"role": "assistant", "content": called.content}, result]
after = client.messages.create(model=model, max_tokens=16, messages=history, tools=[tool])
assert after.usage.input_tokens + after.usage.cache_read_input_tokens > called.usage.input_tokens, after

short = client.messages.create(model=model, max_tokens=1, messages=question)
assert short.stop_reason == "max_tokens", short
for wrong, error in [
    ({"model": "no-such-model"}, anthropic.NotFoundError),
    ({"messages": []}, anthropic.BadRequestError),
    ({"extra_body": {"top_p": 2.0}}, anthropic.BadRequestError),
]:
    try:
        client.messages.create(**{"model": model, "max_tokens": 4, "messages": question, **wrong})
        raise AssertionError(f"{wrong} was served")
    except error:
        pass
print("anthropic", anthropic.__version__, "fine")
