"""LangChain's ChatOpenAI."""

import json
import sys

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Fruit(BaseModel):
    """A fruit."""

    name: str = Field(max_length=12)
    ripe: bool


chat = ChatOpenAI(base_url=sys.argv[1], api_key="any", model="smollm2-135m-instruct", max_tokens=24)
reply = chat.invoke("Name a fruit.")
parts = [each.content for each in chat.stream("Name a fruit.")]
longer = ChatOpenAI(base_url=sys.argv[1], api_key="any", model="smollm2-135m-instruct", max_tokens=60)
held = longer.with_structured_output(Fruit, method="json_schema").invoke("Name a fruit.")
told = {
    "text": reply.content,
    "streamed": "".join(parts),
    "completion_tokens": reply.usage_metadata["output_tokens"],
    "held": held.model_dump(),
}
print(json.dumps(told))
