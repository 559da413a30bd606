"""Called by run.py with the client that openapi-python-client generated (polylora_client) on the path: python_client.py URL."""
import sys

from polylora_client import Client
from polylora_client.api.adapters import load_lora_adapter, unload_lora_adapter
from polylora_client.api.native import generate
from polylora_client.api.open_ai import chat_completions, list_models, retrieve_model
from polylora_client.models import (ChatMessage, ChatRequest, ChatResponse, ErrorBody, GenerateRequest, LoadAdapterRequest, NativeSamplingParams, Role,
                                    UnloadAdapterRequest)

with Client(base_url=sys.argv[1], raise_on_unexpected_status=True) as client:
    models = list_models.sync(client=client)
    assert models.data[0].parent is None and {card.parent for card in models.data[1:]} == {models.data[0].id}, models
    assert retrieve_model.sync("json", client=client).adapter.lora_rank > 0

    request = ChatRequest(model="demo:json", messages=[ChatMessage(role=Role.USER, content="List 3 countries.")], temperature=0.0, max_tokens=8)
    answer = chat_completions.sync(client=client, body=request)
    assert isinstance(answer, ChatResponse) and answer.choices[0].message.content, answer
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 8), answer

    request.model = "nobody"
    error = chat_completions.sync(client=client, body=request)
    assert isinstance(error, ErrorBody) and error.error.code == "model_not_found", error

    both = generate.sync(client=client, body=GenerateRequest(text=["a", "b"], lora_path=["json", None], return_logprob=True,
                                                             sampling_params=NativeSamplingParams(max_new_tokens=3)))
    assert [one.meta_info.lora for one in both] == ["json", None], both
    assert len(both[0].meta_info.output_token_logprobs[0]) == 3, both

    loaded = load_lora_adapter.sync(client=client, body=LoadAdapterRequest(lora_name="generated", lora_path="demo:sql"))
    assert loaded.success and "generated" in loaded.loaded_adapters.additional_properties, loaded
    unloaded = unload_lora_adapter.sync(client=client, body=UnloadAdapterRequest(lora_name="generated"))
    assert unloaded.success and "generated" not in unloaded.loaded_adapters.additional_properties, unloaded
print("generated Python client: 8 calls ok")
