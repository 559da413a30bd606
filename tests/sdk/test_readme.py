"""The README's blocks, copied as they stand, against a server started as it says. A block that no test runs is in NOT_RUN with the reason."""
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

from server import BINARY, DEMO, ROOT, Server, golden, golden_for, LIST_3

# The first words of blocks that are not run here, and why.
NOT_RUN = {
    "cargo run --release ": "the server of this test is that one, built in debug; the second line is CI's step `test`",
    "cargo run --release -- bench": "a measurement of many minutes, and downloads of models",
}


def blocks(language):
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        return re.findall(rf"```{language}\n(.*?)```", file.read(), re.DOTALL)


def block(beginning, containing=""):
    """The one block that begins so."""
    found, = [block for block in blocks("sh") if block.startswith(beginning) and containing in block]
    return found


@contextlib.contextmanager
def folder_of_the_readme():
    """A folder with the model and the adapters that the README's commands name, which are the demo's, and `polylora` on the path."""
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.join(DEMO, "base"), os.path.join(folder, "Qwen2.5-0.5B-Instruct"))
        os.symlink(BINARY, os.path.join(folder, "polylora"))
        for name, adapter in (("sql", "sql"), ("json", "json"), ("summary", "upper")):
            shutil.copytree(os.path.join(DEMO, "adapters", adapter), os.path.join(folder, "adapters", name))
        yield folder, {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


class Readme(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = cls.enterClassContext(Server(port=30000))

    def curl(self, path):
        return json.loads(subprocess.run(["bash", "-c", block("curl", path)], capture_output=True, check=True).stdout)

    def test_every_block_is_run_or_its_reason_given(self):
        run = ["curl -s http://127.0.0.1:30000/v1/chat/completions", "curl -s http://127.0.0.1:30000/generate", "polylora serve", "polylora adapters"]
        for text in blocks("sh"):
            self.assertEqual(len([head for head in [*run, *NOT_RUN] if text.startswith(head)]) >= 1, True, f"no test runs:\n{text}")
        self.assertEqual(len(blocks("python")), 1)
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
            fences = re.findall(r"^```(.*)$", file.read(), re.MULTILINE)
        self.assertEqual(set(fences), {"sh", "python", ""}, "blocks of other languages need a test of their own")

    def test_chat(self):
        answer = self.curl("/v1/chat/completions")
        self.assertEqual(answer["choices"][0]["message"]["content"], golden("json", "chat")["output_text"])

    def test_generate(self):
        answers = self.curl("/generate")
        self.assertEqual([answer["text"] for answer in answers], [golden_for(name, LIST_3)["output_text"] for name in ("table", "flags", None)])

    def test_python(self):
        output = subprocess.run([sys.executable, "-c", blocks("python")[0]], capture_output=True, text=True, check=True).stdout
        for name in (None, "lines", "table", "json", "pirate", "sql", "upper", "flags", "yaml"):
            self.assertIn(f"--- {name or 'demo'}\n{golden(name, 'chat')['output_text']}\n", output)

    def test_adapters_commands(self):
        with folder_of_the_readme() as (folder, environment):
            run = subprocess.run(["bash", "-euxc", block("polylora adapters load")], cwd=folder, env=environment, capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        self.assertIn("summary", run.stdout)
        self.assertNotIn("summary", self.server.get("/v1/models")[1], "unloaded in the end")

    def test_own_model_and_adapters(self):
        local, _from_the_hub = block("polylora serve").splitlines()     # nothing reaches the Hub from CI
        with folder_of_the_readme() as (folder, environment):
            arguments = local.split()
            self.assertEqual(arguments[:2], ["polylora", "serve"])
            with Server(*arguments[2:], folder=folder) as server:
                models = [card["id"] for card in server.get("/v1/models")[1]["data"]]
                self.assertEqual(set(models[1:]), {"sql", "json"})
                answer = server.post("/v1/chat/completions", {"model": "sql", "messages": [{"role": "user", "content": LIST_3}], "temperature": 0})[1]
        self.assertEqual(answer["choices"][0]["message"]["content"], golden("sql", "chat")["output_text"])


class AdaptersAtRunTime(unittest.TestCase):
    def test_line_by_line(self):
        """The block about aliases, pushes and unloads, each line (with its continuation) by itself, with what it must change."""
        lines = block("polylora adapters alias").replace("\\\n", " ").splitlines()
        with Server(port=30000) as server, folder_of_the_readme() as (_, environment):
            def answer(name, **more):
                status, answer = server.post("/generate", {"text": LIST_3, "sampling_params": {"max_new_tokens": 96, "temperature": 0},
                                                           "lora_path": name, **more})
                self.assertEqual(status, 200, answer)
                return answer

            def answered_by(name):
                """The adapters that answer a hundred users."""
                return {answer(name, rid=f"user-{user}")["meta_info"]["lora"] for user in range(100)}

            def says(name, adapter):
                self.assertEqual(answer(name)["text"], golden_for(adapter, LIST_3)["output_text"])

            def unknown(name):
                self.assertEqual(server.post("/v1/completions", {"model": name, "prompt": "a"})[0], 404)

            after = [
                lambda out: says("support", "json"),
                lambda out: self.assertEqual(answered_by("support"), {"json", "yaml"}),
                lambda out: says("yaml", "table"),
                lambda out: says("yaml", "yaml"),
                lambda out: self.assertIn("pinned json", out),
                lambda out: self.assertRegex(out, r"(?m)^support +alias .*json \(90 %\), yaml \(10 %\)$"),
                lambda out: self.assertEqual(answered_by("support"), {"json"}),
                lambda out: unknown("yaml"),
            ]
            for line, check in zip(lines, after, strict=True):
                run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, env=environment)
                self.assertEqual(run.returncode, 0, f"{line}\n{run.stderr}")
                check(run.stdout)


if __name__ == "__main__":
    unittest.main()
