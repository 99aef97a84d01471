"""OpenAI's client."""

import json
import sys

from openai import OpenAI
from pydantic import BaseModel, Field


class Fruit(BaseModel):
    name: str = Field(max_length=12)
    ripe: bool


client = OpenAI(base_url=sys.argv[1], api_key="any")
model = client.models.list().data[0].id
asked = {"model": model, "messages": [{"role": "user", "content": "Name a fruit."}], "max_tokens": 24}
reply = client.chat.completions.create(**asked)
stream = client.chat.completions.create(**asked, stream=True)
parts = [each.choices[0].delta.content or "" for each in stream if each.choices]
held = client.chat.completions.parse(**asked | {"max_tokens": 60}, response_format=Fruit)
told = {
    "text": reply.choices[0].message.content,
    "streamed": "".join(parts),
    "completion_tokens": reply.usage.completion_tokens,
    "held": held.choices[0].message.parsed.model_dump(),
}
print(json.dumps(told))
