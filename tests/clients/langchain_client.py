"""LangChain's ChatOpenAI against a running server: answers, streams, structured output, tools, over chat and over responses."""

import importlib.metadata
import json
import sys
import urllib.request

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

with urllib.request.urlopen(f"{sys.argv[1]}/v1/models") as models:
    model = json.load(models)["data"][0]["id"]
question = "What is 7 + 5?"


class Sum(BaseModel):
    """Two numbers."""

    first: int = Field(ge=0, le=99)
    second: int = Field(ge=0, le=99)


@tool
def weather(city: str) -> str:
    """Says how it will be."""
    return f"sunny in {city}"


for over_responses in (False, True):
    chat = ChatOpenAI(
        model=model, base_url=f"{sys.argv[1]}/v1", api_key="none", temperature=0, seed=None if over_responses else 7,
        max_retries=0, max_tokens=200, use_responses_api=over_responses,
    )
    answer = chat.invoke(question)
    assert answer.text and answer.usage_metadata["output_tokens"] > 0, answer
    assert "".join(piece.text for piece in chat.stream(question)) == answer.text
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(Sum, method=method).invoke("Give a sum.")
        assert isinstance(found, Sum), found
    called = chat.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False).invoke("How is Rome?")
    (call,) = called.tool_calls
    assert call["name"] == "weather" and isinstance(call["args"]["city"], str), call
    history = [HumanMessage("How is Rome?"), called, ToolMessage("sunny", tool_call_id=call["id"])]
    after = chat.bind_tools([weather]).invoke(history)
    assert after.usage_metadata["input_tokens"] > called.usage_metadata["input_tokens"], after
print("langchain-openai", importlib.metadata.version("langchain-openai"), "fine")
