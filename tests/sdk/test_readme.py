"""The README's curl and Python lines, copied as they stand, against a server started as it says."""
import json
import os
import re
import subprocess
import sys
import unittest

from server import ROOT, Server, golden, golden_for, LIST_3


def blocks(language):
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        return re.findall(rf"```{language}\n(.*?)```", file.read(), re.DOTALL)


class Readme(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = cls.enterClassContext(Server(port=30000))

    def curl(self, path):
        command = next(block for block in blocks("sh") if block.startswith("curl") and path in block)
        return json.loads(subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout)

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


if __name__ == "__main__":
    unittest.main()
