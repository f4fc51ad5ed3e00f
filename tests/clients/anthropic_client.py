"""The `anthropic` package against a running server: messages, streams, counting, errors."""

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
