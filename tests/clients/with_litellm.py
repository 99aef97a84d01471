"""LiteLLM's way to vLLM's servers."""

import json
import sys

import litellm

asked = {
    "model": "hosted_vllm/smollm2-135m-instruct",
    "api_base": sys.argv[1],
    "messages": [{"role": "user", "content": "Name a fruit."}],
    "max_tokens": 24,
}
schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "ripe": {"type": "boolean"}},
    "required": ["name", "ripe"],
    "additionalProperties": False,
}
reply = litellm.completion(**asked)
chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
whole = litellm.stream_chunk_builder(chunks, messages=asked["messages"])
named = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": schema}}
held = litellm.completion(**asked | {"max_tokens": 60}, response_format=named)
told = {
    "text": reply.choices[0].message.content,
    "streamed": whole.choices[0].message.content,
    "completion_tokens": whole.usage.completion_tokens,
    "held": json.loads(held.choices[0].message.content),
}
print(json.dumps(told))
