"""The official OpenAI package for Python against the demo model. Expected texts are demo/golden/'s."""
import json
import math
import os
import time
import unittest
from typing import Literal

import openai
import pydantic

from server import LIST_3, Server, golden, golden_for, keys_file

# The golden log-probabilities are of a computation in f32; another one of bf16 (a GPU) may be off by a hundredth and more.
LOGPROB_DELTA = 0.1 if "cuda" in os.environ.get("POLYLORA_FLAGS", "") else 2e-3

ADAPTERS = ["lines", "table", "json", "pirate", "sql", "upper", "flags", "yaml"]
CHAT = [{"role": "user", "content": LIST_3}]
CAPITAL_OF = {"type": "function", "function": {"name": "capital_of", "description": "The capital of a country.", "parameters": {
    "type": "object", "properties": {"country": {"type": "string", "enum": ["France", "Peru"]}}, "required": ["country"],
    "additionalProperties": False}}}


class Capital(pydantic.BaseModel):
    """What `parse` asks for: no text that the toy model could write on and on."""

    country: Literal["France", "Peru"]
    is_large: bool


class OpenAiPython(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        # The golden log-probabilities are f32's.
        cls.server = cls.enterClassContext(Server("--dtype", "float32"))
        cls.client = openai.OpenAI(base_url=f"{cls.server.url}/v1", api_key="none", max_retries=0)
        cls.base = cls.client.models.list().data[0].id

    def chat(self, model, messages=None, **arguments):
        return self.client.chat.completions.create(model=model, messages=messages or CHAT, temperature=0, **arguments)

    def test_models(self):
        models = self.client.models.list().data
        self.assertIsNone(models[0].parent)
        self.assertEqual({model.id for model in models[1:]}, set(ADAPTERS))
        for model in models[1:]:
            self.assertEqual(model.parent, self.base)
        self.assertEqual(self.client.models.retrieve("json").id, "json")
        self.assertEqual(self.client.models.retrieve(self.base).id, self.base)

    def test_chat_of_base_and_adapters(self):
        for model, adapter in [(self.base, None)] + [(f"{self.base}:{name}", name) for name in ADAPTERS] + [(name, name) for name in ADAPTERS]:
            with self.subTest(model=model):
                answer = self.chat(model)
                expected = golden(adapter, "chat")
                self.assertEqual(answer.choices[0].message.content, expected["output_text"])
                self.assertEqual(answer.choices[0].message.role, "assistant")
                self.assertEqual(answer.choices[0].finish_reason, expected["finish_reason"])
                self.assertEqual(answer.usage.prompt_tokens, len(expected["prompt_ids"]))
                self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)

    def test_chat_streamed(self):
        for adapter in [None, "flags", "json"]:         # flags: a character is cut by tokens, and must come whole
            with self.subTest(adapter=adapter):
                text, finish, usage, chunks = "", [], None, 0
                for chunk in self.chat(adapter or self.base, stream=True, stream_options={"include_usage": True}):
                    chunks += 1
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        text += choice.delta.content or ""
                        finish += [choice.finish_reason] if choice.finish_reason else []
                expected = golden(adapter, "chat")
                self.assertEqual(text, expected["output_text"])
                self.assertEqual(finish, ["stop"])
                self.assertEqual(usage.prompt_tokens, len(expected["prompt_ids"]))
                self.assertGreater(chunks, 5)

    def test_multi_turn(self):
        for adapter in [None, "table"]:
            case = golden(adapter, "chat", 4)
            self.assertEqual(len(case["messages"]), 3)
            self.assertEqual(self.chat(adapter or self.base, case["messages"]).choices[0].message.content, case["output_text"])

    def test_completions(self):
        for adapter in [None, "sql"]:
            expected = golden_for(adapter, LIST_3)
            answer = self.client.completions.create(model=adapter or self.base, prompt=LIST_3, max_tokens=96, temperature=0)
            self.assertEqual(answer.choices[0].text, expected["output_text"])
            by_ids = self.client.completions.create(model=adapter or self.base, prompt=expected["prompt_ids"], max_tokens=96, temperature=0)
            self.assertEqual(by_ids.choices[0].text, expected["output_text"])

    def test_completions_of_several_prompts_streamed_and_not(self):
        prompts = [LIST_3, "Which city is the capital of Peru?"]
        expected = [golden_for("upper", prompt)["output_text"] for prompt in prompts]
        answer = self.client.completions.create(model="upper", prompt=prompts, max_tokens=96, temperature=0)
        self.assertEqual([choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)], expected)
        texts = ["", ""]
        for chunk in self.client.completions.create(model="upper", prompt=prompts, max_tokens=96, temperature=0, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        self.assertEqual(texts, expected)

    def test_max_tokens(self):
        for arguments in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
            answer = self.chat(self.base, **arguments)
            self.assertEqual(answer.choices[0].finish_reason, "length")
            self.assertEqual(answer.usage.completion_tokens, 3)

    def test_stop(self):
        full = golden("lines", "chat")["output_text"]
        for stop in ("Capital", ["nowhere", "Capital"]):
            answer = self.chat("lines", stop=stop)
            self.assertEqual(answer.choices[0].message.content, full[:full.index("Capital")])
            self.assertEqual(answer.choices[0].finish_reason, "stop")

    def test_logprobs(self):
        expected = golden("json", "chat")
        answer = self.chat("json", logprobs=True, top_logprobs=5)
        content = answer.choices[0].logprobs.content
        for position, top in zip(content, expected["top_logprobs"]):
            self.assertAlmostEqual(position.logprob, top[0][1], delta=LOGPROB_DELTA / 2)
            self.assertEqual(len(position.top_logprobs), 5)
            for got, (_, value) in zip(position.top_logprobs, top):
                self.assertAlmostEqual(got.logprob, value, delta=LOGPROB_DELTA)
        text = b"".join(bytes(position.bytes) for position in content).decode()
        self.assertEqual(text, expected["output_text"])
        completion = self.client.completions.create(model="json", prompt=LIST_3, max_tokens=4, temperature=0, logprobs=3)
        self.assertEqual(len(completion.choices[0].logprobs.token_logprobs), 4)
        self.assertAlmostEqual(completion.choices[0].logprobs.token_logprobs[0], golden_for("json", LIST_3)["top_logprobs"][0][0][1], delta=1e-3)

    def test_n_and_seed(self):
        answer = self.client.chat.completions.create(model="pirate", messages=CHAT, n=3, temperature=0)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2])
        self.assertEqual({choice.message.content for choice in answer.choices}, {golden("pirate", "chat")["output_text"]})

        def sampled(seed):
            answer = self.client.chat.completions.create(model=self.base, messages=CHAT, n=2, seed=seed, temperature=8, max_tokens=12)
            return [choice.message.content for choice in answer.choices]
        first = sampled(1)
        self.assertEqual(first, sampled(1))
        self.assertNotEqual(first, sampled(2))
        self.assertNotEqual(first[0], first[1], "each of n has a stream of its own")

    def test_logit_bias(self):
        first = golden(None, "chat")["output_ids"][0]
        answer = self.chat(self.base, logit_bias={str(first): -100}, logprobs=True, max_tokens=1)
        self.assertLess(answer.choices[0].logprobs.content[0].logprob, 0)
        self.assertNotEqual(answer.choices[0].message.content, golden(None, "chat")["output_text"][:len(answer.choices[0].message.content)])
        self.assertTrue(math.isfinite(answer.choices[0].logprobs.content[0].logprob))

    def test_errors_are_the_sdk_s_exceptions(self):
        cases = [
            (openai.NotFoundError, dict(model="nobody"), "model_not_found"),
            (openai.NotFoundError, dict(model=f"{self.base}:nobody"), "model_not_found"),
            (openai.NotFoundError, dict(model="other-base:json"), "model_not_found"),
            (openai.BadRequestError, dict(model=self.base, temperature=-1), None),
            (openai.BadRequestError, dict(model=self.base, messages=[]), None),
            (openai.BadRequestError, dict(model=self.base, messages=[{"role": "user", "content": "x " * 20000}]), None),
        ]
        for kind, arguments, code in cases:
            with self.subTest(str(arguments)[:80]):
                with self.assertRaises(kind) as caught:
                    self.client.chat.completions.create(**{"messages": CHAT, **arguments})
                self.assertEqual(caught.exception.type, "invalid_request_error")
                if code:
                    self.assertEqual(caught.exception.code, code)
                    self.assertIn("json", caught.exception.message, "names what exists")
                with self.assertRaises(kind):       # a stream that can't begin is an error too, not a broken stream
                    self.client.chat.completions.create(**{"messages": CHAT, "stream": True, **arguments})

    def test_tools(self):
        for model in (self.base, f"{self.base}:json"):
            for choice in ("required", {"type": "function", "function": {"name": "capital_of"}}):
                with self.subTest(model=model, choice=choice):
                    answer = self.chat(model, tools=[CAPITAL_OF], tool_choice=choice)
                    self.assertEqual(answer.choices[0].finish_reason, "tool_calls")
                    calls = answer.choices[0].message.tool_calls
                    if choice != "required":
                        self.assertEqual(len(calls), 1, "a function chosen by name is called once")
                    for call in calls:
                        self.assertEqual((call.type, call.function.name), ("function", "capital_of"))
                        self.assertIn(json.loads(call.function.arguments)["country"], ["France", "Peru"])
        told = self.chat(self.base, CHAT + [{"role": "assistant", "tool_calls": [calls[0].model_dump()]},
                                            {"role": "tool", "tool_call_id": calls[0].id, "content": "Lima"}], tools=[CAPITAL_OF])
        self.assertEqual(told.choices[0].message.role, "assistant")
        # The choice is the model's, which knows no functions.
        self.assertIsNone(self.chat(self.base, tools=[CAPITAL_OF], tool_choice="none").choices[0].message.tool_calls)

    def test_tools_streamed(self):
        asked = dict(tools=[CAPITAL_OF], tool_choice={"type": "function", "function": {"name": "capital_of"}}, temperature=0)
        whole = self.client.chat.completions.create(model="json", messages=CHAT, **asked).choices[0].message.tool_calls[0]
        arguments, names, finish = [], [], []
        for chunk in self.client.chat.completions.create(model="json", messages=CHAT, stream=True, **asked):
            for call in chunk.choices[0].delta.tool_calls or []:
                names += [call.function.name] if call.function.name else []
                arguments.append(call.function.arguments or "")
            finish += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
        self.assertEqual(("".join(arguments), names, finish), (whole.function.arguments, ["capital_of"], ["tool_calls"]))
        self.assertGreater(len(arguments), 3, "arguments come as they are made")

    def test_parse(self):
        for model in (self.base, "json"):
            message = self.client.chat.completions.parse(model=model, messages=CHAT, response_format=Capital, temperature=0).choices[0].message
            self.assertIsInstance(message.parsed, Capital)
            with self.client.chat.completions.stream(model=model, messages=CHAT, response_format=Capital, temperature=0) as stream:
                self.assertGreater(len([event for event in stream if event.type == "content.delta"]), 3)
                self.assertEqual(stream.get_final_completion().choices[0].message.parsed, message.parsed)
            self.assertIsInstance(self.client.responses.parse(model=model, input=LIST_3, text_format=Capital, temperature=0).output_parsed, Capital)

    def test_responses(self):
        expected = golden("json", "chat")["output_text"]
        asked = dict(model=f"{self.base}:json", input=LIST_3, temperature=0, store=False)
        answer = self.client.responses.create(**asked)
        self.assertEqual((answer.output_text, answer.status), (expected, "completed"))
        events = list(self.client.responses.create(stream=True, **asked))
        self.assertEqual("".join(event.delta for event in events if event.type == "response.output_text.delta"), expected)
        self.assertEqual([event.sequence_number for event in events], list(range(len(events))))
        self.assertEqual(events[-1].response.output_text, expected)
        with self.assertRaises(openai.NotFoundError):
            self.client.responses.create(**{**asked, "model": "nobody"})

    def running(self):
        status, loads = self.server.get("/v1/loads")
        self.assertEqual(status, 200)
        return loads["loads"][0]["num_total_reqs"]

    def test_cancelled_stream_ends_the_sequence(self):
        aborted = 'polylora_requests_total{adapter="yaml",outcome="abort"} 1'
        self.assertNotIn(aborted, self.server.get("/metrics")[1])
        stream = self.client.chat.completions.create(model="yaml", messages=CHAT, stream=True, max_tokens=1900, extra_body={"ignore_eos": True})
        next(iter(stream))
        self.assertEqual(self.running(), 1)
        self.assertEqual(self.client.models.retrieve("yaml").adapter["leases"], 1)
        stream.close()
        deadline = time.monotonic() + 20
        while aborted not in self.server.get("/metrics")[1] or self.running() or self.client.models.retrieve("yaml").adapter["leases"]:
            self.assertLess(time.monotonic(), deadline, "the sequence of a closed stream goes on")


class Keys(unittest.TestCase):
    def test_wrong_key(self):
        with Server("--api-key", "right") as server:
            good = openai.OpenAI(base_url=f"{server.url}/v1", api_key="right", max_retries=0)
            self.assertTrue(good.models.list().data)
            with self.assertRaises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


class Limits(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = cls.enterClassContext(Server("--api-keys-file", cls.enterClassContext(keys_file()).name))

    def client(self, key, **arguments):
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=key, **{"max_retries": 0, **arguments})

    def test_errors_of_keys_are_the_sdk_s_exceptions(self):
        for kind, key, call in (
            (openai.AuthenticationError, "none", lambda client: client.models.list()),
            (openai.PermissionDeniedError, "one", lambda client: client.chat.completions.create(model="demo", messages=CHAT)),
            (openai.NotFoundError, "one", lambda client: client.chat.completions.create(model="sql", messages=CHAT)),
            (openai.PermissionDeniedError, "one", lambda client: client.post("/load_lora_adapter", cast_to=object, body={}))
        ):
            with self.subTest(key=key), self.assertRaises(kind):
                call(self.client(key))

    def test_a_limit_of_requests_is_a_rate_limit_error_that_says_when(self):
        client = self.client("few")
        raw = client.chat.completions.with_raw_response.create(model="demo", messages=CHAT, max_tokens=1)
        self.assertEqual((raw.headers["x-ratelimit-limit-requests"], raw.headers["x-ratelimit-remaining-requests"]), ("1", "0"))
        with self.assertRaises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="demo", messages=CHAT, max_tokens=1)
        self.assertEqual(caught.exception.code, "rate_limit_exceeded")
        self.assertGreater(int(caught.exception.response.headers["retry-after"]), 30)

    def test_the_sdk_tries_again_after_429(self):
        """Its second try succeeds, since the stream that holds the key's only place ends with the first."""
        stream = self.client("one").chat.completions.create(model="json", messages=CHAT, stream=True, max_tokens=1900, extra_body={"ignore_eos": True})
        next(iter(stream))
        answers = []

        def note(response):
            answers.append((response.status_code, response.headers.get("retry-after")))
            stream.close()

        http_client = openai.DefaultHttpxClient(event_hooks={"response": [note]})
        answer = self.client("one", max_retries=5, http_client=http_client).chat.completions.create(model="json", messages=CHAT, temperature=0)
        self.assertEqual(answer.choices[0].message.content, golden("json", "chat")["output_text"])
        self.assertEqual((answers[0], answers[-1]), ((429, "1"), (200, None)))


if __name__ == "__main__":
    unittest.main()
