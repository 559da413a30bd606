"""A polylora server as a context manager, and the golden answers of the demo model."""
import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BINARY = os.environ.get("POLYLORA", os.path.join(ROOT, "target", "debug", "polylora"))
DEMO = os.path.join(ROOT, "demo")
LIST_3 = "List 3 countries and their capitals."
KEYS = """
[[keys]]
name = "one-at-a-time"
sha256 = "{one}"
adapters = ["json"]
base_model = false
concurrent_requests = 1

[[keys]]
name = "few"
sha256 = "{few}"
requests_per_minute = 1
"""


def golden(adapter, kind, index=0):
    """The index-th golden case of a kind (`raw` or `chat`) of an adapter (None: the base model)."""
    with open(os.path.join(DEMO, "golden", f"{adapter or 'base'}.json"), encoding="utf-8") as file:
        return [case for case in json.load(file)["cases"] if case["kind"] == kind][index]


def golden_for(adapter, prompt):
    """The golden case of a raw prompt, or of a chat whose only message it is."""
    for kind in ("raw", "chat"):
        with open(os.path.join(DEMO, "golden", f"{adapter or 'base'}.json"), encoding="utf-8") as file:
            for case in json.load(file)["cases"]:
                if case["kind"] == kind and case["prompt"] == prompt:
                    return case
    raise KeyError(prompt)


def adapter_path(name):
    return os.path.join(DEMO, "adapters", name)


def keys_file():
    """A temporary file for --api-keys-file with the keys "one" (one request at a time, of one adapter) and "few" (one request a minute)."""
    file = tempfile.NamedTemporaryFile("w", suffix=".toml")
    file.write(KEYS.format(**{key: hashlib.sha256(key.encode()).hexdigest() for key in ("one", "few")}))
    file.flush()
    return file


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`polylora serve` with the given flags on a free port; stopped with SIGTERM at the end, and the log must hold no warning."""

    def __init__(self, *flags, port=None, warnings_expected=False, folder=ROOT):
        self.flags, self.port, self.warnings_expected, self.folder = flags, port, warnings_expected, folder

    def __enter__(self):
        port = self.port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        flags = [*shlex.split(os.environ.get("POLYLORA_FLAGS", "")), *self.flags]
        self.process = subprocess.Popen([BINARY, "serve", "--port", str(port), *flags], stdout=self.log, stderr=subprocess.STDOUT,
                                        cwd=self.folder)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    raise RuntimeError(f"the server did not start:\n{self.output()}")
                time.sleep(0.05)

    def __exit__(self, kind, *_):
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=30)
        output = self.output()
        if kind is None:
            assert status == 0, f"exit status {status}\n{output}"
            if not self.warnings_expected:
                bad = [line for line in output.splitlines() if " WARN " in line or " ERROR " in line]
                assert not bad, "the log of a normal run holds warnings:\n" + "\n".join(bad)

    def output(self):
        with open(self.log.name, encoding="utf-8", errors="replace") as file:
            return file.read()

    def get(self, path):
        return self.request("GET", path, None)

    def post(self, path, body):
        return self.request("POST", path, body)

    def request(self, method, path, body):
        """(status, parsed body): JSON where it is JSON, else text."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def events(self, path, body):
        """The payloads of a server-sent event stream, which must end with [DONE]."""
        request = urllib.request.Request(self.url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
        payloads = []
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream"), response.headers["Content-Type"]
            for line in response:
                line = line.decode().rstrip("\n")
                if line.startswith("data: "):
                    payloads.append(line[len("data: "):])
        assert payloads[-1] == "[DONE]", payloads[-1:]
        return [json.loads(payload) for payload in payloads[:-1]]
