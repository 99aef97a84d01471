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
by_calling = longer.with_structured_output(Fruit, method="function_calling").invoke("Name a fruit.")
tools = longer.bind_tools([Fruit], tool_choice="Fruit")
(call,) = tools.invoke("Name a fruit.").tool_calls
newer = ChatOpenAI(
    base_url=sys.argv[1],
    api_key="any",
    model="smollm2-135m-instruct",
    max_tokens=60,
    use_responses_api=True,
).bind_tools([Fruit], tool_choice="Fruit")
(call_in_response,) = newer.invoke("Name a fruit.").tool_calls
whole, *rest = newer.stream("Name a fruit.")
for part in rest:
    whole += part
told = {
    "text": reply.content,
    "streamed": "".join(parts),
    "completion_tokens": reply.usage_metadata["output_tokens"],
    "called": Fruit(**call["args"]).model_dump(),
    "called_in_response": Fruit(**call_in_response["args"]).model_dump(),
    "streamed_in_response": whole.tool_calls[0]["args"] == call_in_response["args"],
    "by_calling": by_calling.model_dump(),
    "held": held.model_dump(),
}
print(json.dumps(told))
