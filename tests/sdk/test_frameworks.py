"""LangChain's ChatOpenAI and LiteLLM, unchanged, against the demo model: chat, streams, functions, an adapter by `base:adapter`."""
import os
import unittest
import warnings
from typing import Literal

# LiteLLM would fetch its table of prices, and LangChain would look for a tracer.
os.environ.update(LITELLM_LOCAL_MODEL_COST_MAP="True", LANGSMITH_TRACING="false")

# Pydantic has something to say about LiteLLM's types.
warnings.filterwarnings("ignore", category=UserWarning, module="pydantic")

import litellm
import openai
import pydantic
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

from server import LIST_3, Server, golden

litellm.suppress_debug_info = True

CAPITAL_OF = {"type": "function", "function": {"name": "capital_of", "description": "The capital of a country.", "parameters": {
    "type": "object", "properties": {"country": {"type": "string", "enum": ["France", "Peru"]}}, "required": ["country"]}}}


class Capital(pydantic.BaseModel):
    """The capital of a country."""

    country: Literal["France", "Peru"]


class LangChain(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = cls.enterClassContext(Server())

    def model(self, name):
        return ChatOpenAI(model=name, base_url=f"{self.server.url}/v1", api_key="none", temperature=0, max_retries=0)

    def test_chat_of_base_and_adapter(self):
        for name, adapter in (("demo", None), ("demo:json", "json"), ("table", "table")):
            message = self.model(name).invoke([HumanMessage(LIST_3)])
            self.assertEqual(message.content, golden(adapter, "chat")["output_text"])
            self.assertEqual(message.usage_metadata["input_tokens"], len(golden(adapter, "chat")["prompt_ids"]))

    def test_stream(self):
        pieces = list(self.model("demo:flags").stream(LIST_3))
        self.assertEqual("".join(piece.content for piece in pieces), golden("flags", "chat")["output_text"])
        self.assertGreater(len(pieces), 5)

    def test_tools(self):
        model = self.model("demo:json").bind_tools([Capital], tool_choice="Capital")
        call, = model.invoke(LIST_3).tool_calls
        self.assertEqual(call["name"], "Capital")
        self.assertIn(call["args"]["country"], ["France", "Peru"])
        streamed = None
        for piece in model.stream(LIST_3):
            streamed = piece if streamed is None else streamed + piece
        self.assertEqual([(call["name"], call["args"]) for call in streamed.tool_calls], [(call["name"], call["args"])])

    def test_structured_output(self):
        for method in ("json_schema", "function_calling"):
            self.assertIsInstance(self.model("demo:json").with_structured_output(Capital, method=method).invoke(LIST_3), Capital)

    def test_unknown_adapter(self):
        with self.assertRaises(openai.NotFoundError):
            self.model("demo:nobody").invoke(LIST_3)


class LiteLlm(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = cls.enterClassContext(Server())

    def complete(self, model, **arguments):
        return litellm.completion(model=f"openai/{model}", messages=[{"role": "user", "content": LIST_3}], api_base=f"{self.server.url}/v1",
                                  api_key="none", temperature=0, num_retries=0, **arguments)

    def test_chat_of_base_and_adapter(self):
        for name, adapter in (("demo", None), ("demo:json", "json"), ("table", "table")):
            self.assertEqual(self.complete(name).choices[0].message.content, golden(adapter, "chat")["output_text"])

    def test_stream(self):
        pieces = [chunk.choices[0].delta.content or "" for chunk in self.complete("demo:flags", stream=True)]
        self.assertEqual("".join(pieces), golden("flags", "chat")["output_text"])
        self.assertGreater(len(pieces), 5)

    def test_tools(self):
        asked = dict(tools=[CAPITAL_OF], tool_choice={"type": "function", "function": {"name": "capital_of"}})
        call, = self.complete("demo:json", **asked).choices[0].message.tool_calls
        self.assertEqual(call.function.name, "capital_of")
        self.assertIn(call.function.arguments, ['{"country": "France"}', '{"country": "Peru"}'])
        chunks = list(self.complete("demo:json", stream=True, **asked))
        streamed, = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
        self.assertEqual(streamed.function.arguments, call.function.arguments)

    def test_unknown_adapter(self):
        with self.assertRaises(litellm.NotFoundError):
            self.complete("demo:nobody")


if __name__ == "__main__":
    unittest.main()
