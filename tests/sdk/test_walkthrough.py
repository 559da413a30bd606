"""The walk-through of SGLang's documentation ("LoRA Serving"), step by step, over the demo model."""
import os
import tempfile
import unittest

from server import LIST_3, Server, adapter_path, golden_for

AI = "AI is a field of computer science focused on"
GREEDY = {"max_new_tokens": 96, "temperature": 0}


class WalkThrough(unittest.TestCase):
    def check(self, server, prompts, adapters, names=None):
        """One /generate call; `adapters` are the demo's, `names` (default: the same) what the server calls them."""
        names = names or adapters
        status, answers = server.post("/generate", {"text": prompts, "sampling_params": GREEDY, "lora_path": names})
        self.assertEqual(status, 200, answers)
        for answer, prompt, adapter, name in zip(answers, prompts, adapters, names, strict=True):
            expected = golden_for(adapter, prompt)
            self.assertEqual(answer["text"], expected["output_text"])
            self.assertEqual(answer["meta_info"]["lora"], name)
            self.assertEqual(answer["meta_info"]["finish_reason"]["type"], expected["finish_reason"])
            self.assertEqual(answer["meta_info"]["prompt_tokens"], len(expected["prompt_ids"]))

    def load(self, server, name, path, status=200, **more):
        got, answer = server.post("/load_lora_adapter", {"lora_name": name, "lora_path": path, **more})
        self.assertEqual(got, status, answer)
        self.assertEqual(answer["success"], status == 200)
        return answer

    def unload(self, server, name, status=200):
        got, answer = server.post("/unload_lora_adapter", {"lora_name": name})
        self.assertEqual(got, status, answer)
        return answer

    def test_single_adapter_beside_the_base(self):
        with Server("--model-path", "demo/base", "--enable-lora", "--lora-paths", f"lora0={adapter_path('json')}", "--max-loras-per-batch", "2") as server:
            self.check(server, [LIST_3, AI], ["json", None], ["lora0", None])
            # One prompt, one name; and none.
            status, answer = server.post("/generate", {"text": LIST_3, "sampling_params": GREEDY, "lora_path": "lora0"})
            self.assertEqual((status, answer["text"]), (200, golden_for("json", LIST_3)["output_text"]))
            status, answer = server.post("/generate", {"text": LIST_3, "sampling_params": GREEDY})
            self.assertEqual((status, answer["text"]), (200, golden_for(None, LIST_3)["output_text"]))

    def test_several_adapters_in_one_batch(self):
        with Server("--model-path", "demo/base", "--enable-lora", "--lora-paths", f"lora0={adapter_path('lines')}", f"lora1={adapter_path('sql')}",
                    "--max-loras-per-batch", "2", "--max-loaded-loras", "4") as server:
            self.check(server, [LIST_3, LIST_3], ["lines", "sql"], ["lora0", "lora1"])
            self.check(server, [LIST_3, AI, LIST_3], ["lines", None, "sql"], ["lora0", None, "lora1"])

    def test_more_adapters_than_one_batch_may_have(self):
        with Server("--max-loras-per-batch", "2") as server:
            names = ["lines", "table", None, "json", "pirate", "sql", "upper", "flags", "yaml"]
            self.check(server, [LIST_3] * len(names), names)

    def test_load_generate_unload(self):
        with Server("--model-path", "demo/base", "--enable-lora", "--max-lora-rank", "256", "--lora-target-modules", "all", "--max-loras-per-batch", "2",
                    "--max-loaded-loras", "2") as server:
            self.assertEqual(self.load(server, "lora0", adapter_path("pirate"))["loaded_adapters"], {"lora0": adapter_path("pirate")})
            self.assertEqual(set(self.load(server, "lora1", adapter_path("table"))["loaded_adapters"]), {"lora0", "lora1"})
            self.check(server, [LIST_3, LIST_3], ["pirate", "table"], ["lora0", "lora1"])
            self.assertEqual(set(self.unload(server, "lora0")["loaded_adapters"]), {"lora1"})
            # Another adapter under the first's name: nothing of the first may be left, the prefix cache included.
            self.load(server, "lora0", adapter_path("upper"))
            self.check(server, [LIST_3, LIST_3], ["upper", "table"], ["lora0", "lora1"])
            self.assertIn("already loaded", self.load(server, "lora1", adapter_path("table"), status=400)["error_message"])
            self.unload(server, "lora1")
            status, answer = server.post("/generate", {"text": LIST_3, "sampling_params": GREEDY, "lora_path": "lora1"})
            self.assertEqual(status, 404, answer)
            self.assertIn("never been loaded", str(answer))

    def test_pinned(self):
        with Server("--model-path", "demo/base", "--enable-lora", "--max-lora-rank", "64", "--lora-target-modules", "all", "--max-loras-per-batch", "3",
                    "--max-loaded-loras", "4", "--lora-paths", '{"lora_name":"lora0","lora_path":"%s","pinned":true}' % adapter_path("lines"),
                    f"lora1={adapter_path('json')}") as server:
            self.check(server, [LIST_3, LIST_3], ["lines", "json"], ["lora0", "lora1"])
            self.load(server, "lora2", adapter_path("sql"), pinned=True)
            self.assertIn("starvation", self.load(server, "lora3", adapter_path("table"), status=400, pinned=True)["error_message"])
            self.load(server, "lora3", adapter_path("table"))
            self.check(server, [LIST_3] * 4, ["lines", "json", "sql", "table"], ["lora0", "lora1", "lora2", "lora3"])
            self.unload(server, "lora0")

    def test_openai_form(self):
        with Server("--model-path", "demo/base", "--served-model-name", "my-model", "--enable-lora", "--lora-paths", f"lora0={adapter_path('json')}") as server:
            for model, adapter in (("my-model:lora0", "json"), ("lora0", "json"), ("my-model", None)):
                status, answer = server.post("/v1/completions", {"model": model, "prompt": LIST_3, "max_tokens": 96, "temperature": 0})
                self.assertEqual(status, 200, answer)
                self.assertEqual(answer["choices"][0]["text"], golden_for(adapter, LIST_3)["output_text"])
                self.assertEqual(answer["model"], model)

    def test_not_enabled(self):
        with Server("--model-path", "demo/base") as server:
            self.assertIn("not enabled", self.load(server, "lora0", adapter_path("json"), status=400)["error_message"])
            status, answer = server.post("/generate", {"text": LIST_3, "lora_path": "lora0"})
            self.assertEqual(status, 400)
            self.assertIn("not enabled", str(answer))

    def test_incompatible(self):
        with Server("--model-path", "demo/base", "--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj", "v_proj") as server:
            self.assertIn("incompatible", self.load(server, "a", adapter_path("json"), status=400)["error_message"])
            self.load(server, "b", adapter_path("lines"))
            with tempfile.TemporaryDirectory() as empty:
                self.load(server, "c", empty, status=400)
            self.load(server, "d", os.path.join(os.sep, "nowhere"), status=400)
            self.check(server, [LIST_3], ["lines"], ["b"])

    def test_streamed(self):
        with Server() as server:
            status, whole = server.post("/generate", {"text": LIST_3, "sampling_params": GREEDY, "lora_path": "flags"})
            self.assertEqual(status, 200)
            events = server.events("/generate", {"text": LIST_3, "sampling_params": GREEDY, "lora_path": "flags", "stream": True})
            for before, after in zip(events, events[1:]):
                self.assertTrue(after["text"].startswith(before["text"]), "text is cumulative")
                self.assertIsNone(before["meta_info"]["finish_reason"])
            self.assertEqual(events[-1]["text"], whole["text"])
            self.assertEqual(events[-1]["output_ids"], whole["output_ids"])
            self.assertGreater(len(events), 10)


if __name__ == "__main__":
    unittest.main()
