"""OpenAI's client."""

import json
import sys

from openai import OpenAI, pydantic_function_tool
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
tools = [pydantic_function_tool(Fruit, name="fruit")]
called = client.chat.completions.create(**asked | {"max_tokens": 80}, tools=tools, tool_choice="required")
(call, *_) = called.choices[0].message.tool_calls
result = {"role": "tool", "tool_call_id": call.id, "content": "Thanks."}
later = [*asked["messages"], called.choices[0].message, result]
after = client.chat.completions.create(**asked | {"messages": later}, tools=tools)
flat = [{"type": "function"} | tool["function"] for tool in tools]
asked_so = {"model": model, "input": "Name a fruit.", "tools": flat, "tool_choice": "required"}
response = client.responses.create(**asked_so, max_output_tokens=80)
with client.responses.stream(**asked_so, max_output_tokens=80) as events:
    pieces = [each.delta for each in events if each.type == "response.function_call_arguments.delta"]
    streamed = events.get_final_response()
(written, *_) = response.output
result = {"type": "function_call_output", "call_id": written.call_id, "output": "Thanks."}
going_on = client.responses.create(
    model=model,
    input=[{"role": "user", "content": "Name a fruit."}, *response.output, result],
    tools=flat,
    max_output_tokens=8,
)
told = {
    "text": reply.choices[0].message.content,
    "streamed": "".join(parts),
    "completion_tokens": reply.usage.completion_tokens,
    "called_in_response": json.loads(written.arguments),
    "streamed_in_response": "".join(pieces).startswith(streamed.output[0].arguments),
    "cached_in_response": going_on.usage.input_tokens_details.cached_tokens,
    "called": json.loads(call.function.arguments),
    "cached_after_call": after.usage.prompt_tokens_details.cached_tokens,
    "held": held.choices[0].message.parsed.model_dump(),
}
print(json.dumps(told))
