"""The `instructor` package against a running server: models of pydantic filled through tools, schemas and responses."""

import importlib.metadata
import json
import sys
import urllib.request
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field

with urllib.request.urlopen(f"{sys.argv[1]}/v1/models") as models:
    model = json.load(models)["data"][0]["id"]


class Pet(BaseModel):
    """A pet."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=20)
    kind: Literal["cat", "dog"]


plain = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
wanted = {"model": model, "response_model": Pet, "temperature": 0, "max_retries": 0}
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(plain, mode=mode)
    messages = [{"role": "user", "content": "Make up a pet."}]
    pet = client.chat.completions.create(messages=messages, max_tokens=200, **wanted)
    assert isinstance(pet, Pet), pet
client = instructor.from_openai(plain, mode=instructor.Mode.RESPONSES_TOOLS)
pet = client.responses.create(input="Make up a pet.", max_output_tokens=200, **wanted)
assert isinstance(pet, Pet), pet
print("instructor", importlib.metadata.version("instructor"), "fine")
