"""The official OpenAI package for Python against the demo model. Expected texts are demo/golden/'s."""
import math
import time
import unittest

import openai

from server import LIST_3, Server, golden, golden_for

ADAPTERS = ["lines", "table", "json", "pirate", "sql", "upper", "flags", "yaml"]
CHAT = [{"role": "user", "content": LIST_3}]


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
            self.assertAlmostEqual(position.logprob, top[0][1], delta=1e-3)
            self.assertEqual(len(position.top_logprobs), 5)
            for got, (_, value) in zip(position.top_logprobs, top):
                self.assertAlmostEqual(got.logprob, value, delta=2e-3)
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

    def test_cancelled_stream_ends_the_sequence(self):
        aborted = 'polylora_requests_total{adapter="yaml",outcome="abort"} 1'
        self.assertNotIn(aborted, self.server.get("/metrics")[1])
        stream = self.client.chat.completions.create(model="yaml", messages=CHAT, stream=True, max_tokens=1900, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
        deadline = time.monotonic() + 20
        while aborted not in self.server.get("/metrics")[1]:
            self.assertLess(time.monotonic(), deadline, "the sequence of a closed stream goes on")


class Keys(unittest.TestCase):
    def test_wrong_key(self):
        with Server("--api-key", "right") as server:
            good = openai.OpenAI(base_url=f"{server.url}/v1", api_key="right", max_retries=0)
            self.assertTrue(good.models.list().data)
            with self.assertRaises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


if __name__ == "__main__":
    unittest.main()
