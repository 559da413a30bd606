"""Loaded by schemathesis (SCHEMATHESIS_HOOKS): steers random requests past the checks that random values never pass.

Any string is a `model` as far as the document can say, but only names that are served lead to an answer. A request that the document calls
valid also loses the fields that are refused whatever their value, now and then, and names what exists: else hardly one would be answered, and
no answer would be held against its schema. What is wrong on purpose stays wrong.
"""
import collections
import json
import os
import random
import zlib

import schemathesis

MODELS = ["demo", "demo:json", "table", "demo:yaml"]
ADAPTERS = ["json", "table", "yaml", None]
# Fields that are refused unless they say nothing.
REFUSED = ["functions", "function_call", "audio", "web_search_options", "store", "verbosity", "modalities", "background",
           "previous_response_id", "conversation", "truncation", "include", "suffix", "best_of", "is_3d_lora_weight"]
# Fields whose random values are nearly always refused for what they say, not for their type.
PICKY = ["response_format", "json_schema", "regex", "ebnf", "logit_bias", "stop_token_ids", "tools", "tool_choice", "text", "reasoning",
         "continue_final_message", "chat_template_kwargs", "echo", "top_logprobs", "min_tokens", "stream_options", "lora_path"]
GENERATING = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate"]
streams = collections.Counter()


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    # The same case always changes in the same way, so that a failure can be sent again.
    dice = random.Random(zlib.crc32(json.dumps(body, sort_keys=True, default=repr).encode()))
    if isinstance(body.get("model"), str):
        body["model"] = dice.choice(MODELS)
    if case.meta is not None and not case.meta.generation.mode.is_positive:
        return
    loads = "lora_name" in body
    for field in REFUSED:
        if dice.random() < 0.9:
            body.pop(field, None)
    for field in PICKY:
        if dice.random() < 0.6 and not (loads and field == "lora_path"):
            body.pop(field, None)
    if loads:                   # a few names and real paths, so that loads and unloads meet
        if isinstance(body["lora_name"], str) and dice.random() < 0.7:
            body["lora_name"] = dice.choice(["guest", "visitor", "table"])
        if isinstance(body.get("lora_path"), str) and dice.random() < 0.8:
            body["lora_path"] = f"demo:{dice.choice(['sql', 'flags'])}"
        if isinstance(body.get("source"), dict) and isinstance(body["source"].get("uri"), str) and dice.random() < 0.8:
            body["source"]["uri"] = "demo:upper"
    elif isinstance(body.get("lora_path"), str):
        body["lora_path"] = dice.choice(ADAPTERS)
    if case.operation.path in GENERATING and dice.random() < 0.3:
        body["stream"] = True
    for message in body.get("messages") or []:
        if isinstance(message, dict) and dice.random() < 0.9:
            message.pop("audio", None)
            message.pop("function_call", None)
            if isinstance(message.get("content"), list):
                message["content"] = [part for part in message["content"] if isinstance(part, dict) and part.get("type") == "text"
                                      and isinstance(part.get("text"), str)] or "Hello"


@schemathesis.hook
def after_call(context, case, response):
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        streams[case.operation.path] += 1
        with open(os.environ["CONTRACT_STREAMS"], "w", encoding="utf-8") as file:
            json.dump(streams, file)
