#!/usr/bin/env python3
"""What the gateway costs over its mock engine, above the floor of any server here, and how fast it is beside and behind other gateways.

    cargo build --release --examples
    python3 -m venv .venv-gateways && .venv-gateways/bin/pip install sglang-router==0.3.2 vllm-router==0.1.17
    .venv-gateways/bin/python benches/gateways.py [cost] [paced] [first-token] [open] [routers]

The server, the client and what is between them share this machine: nothing else should run on it. Each answer is checked by the client to
its last event. For `paced` and `first-token` the server has one core and the client another. `routers` puts the same mock server behind each
router, in turns; what a router costs is the difference from `direct`.
"""
import argparse
import contextlib
import os
import pathlib
import resource
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "sdk"))
from routers import ROUTERS, Router  # noqa: E402
from server import free_port  # noqa: E402


def on_core(core):
    """For a process that is to have this core only, or all if it is None."""
    return None if core is None else lambda: os.sched_setaffinity(0, {core})


class MockServer:
    def __init__(self, examples, *options, core=None):
        self.core = core
        self.url = f"http://127.0.0.1:{free_port()}"
        self.command = [str(examples / "mock_server"), "--port", self.url.rsplit(":", 1)[1], *options]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, preexec_fn=on_core(self.core))
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, f"{self.command} did not start"
                time.sleep(0.1)

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


class Bench:
    def __init__(self, examples):
        self.examples = examples

    def load(self, server, *options, url=None):
        """Runs the load test on a server (by another address, if given); its figures are of the server's process."""
        command = [str(self.examples / "load_test"), "--url", url or server.url, "--pid", str(server.process.pid), *options]
        subprocess.run(command, check=True, preexec_fn=on_core(None if server.core is None else 1 - server.core))

    def measure(self, options, *loads, core=None):
        with MockServer(self.examples, *options, core=core) as server:
            for load in loads:
                self.load(server, *load)

    def cost(self):
        self.measure(["--output-tokens", "300"], ["cost", "--floor"], ["rate", "--floor", "--requests", "10000"],
                     ["rate", "--floor", "--requests", "20000", "--streams", "16", "--tokens", "1"])

    def paced(self):
        self.measure(["--output-tokens", "300", "--token-interval-ms", "50"], ["paced", "--floor", "--tokens", "300"], core=0)

    def first_token(self):
        self.measure(["--output-tokens", "300", "--token-interval-ms", "50"], ["first-token", "--floor", "--tokens", "300"],
                     ["first-token", "--floor", "--tokens", "300", "--connect"], core=0)

    def open(self):
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        self.measure(["--output-tokens", "2", "--token-interval-ms", "3600000"], ["open", "--streams", "10000"])

    def routers(self):
        with MockServer(self.examples, "--output-tokens", "64") as server, contextlib.ExitStack() as stack:
            urls = {"direct": server.url, **{name: stack.enter_context(Router(name, [server.url])).url for name in ROUTERS}}
            for number in range(3):
                for tokens, requests in (("1", "4000"), ("64", "2000")):
                    for name, url in urls.items():
                        print(f"round {number}, {name}: ", end="", flush=True)
                        self.load(server, "rate", "--streams", "64", "--tokens", tokens, "--requests", requests, url=url)


def main():
    names = ["cost", "paced", "first-token", "open", "routers"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="*", choices=[*names, []], help="all, if none is named")
    parser.add_argument("--examples", type=pathlib.Path, default=ROOT / "target" / "release" / "examples", help="where mock_server and load_test are")
    args = parser.parse_args()
    bench = Bench(args.examples)
    for name in args.measures or names:
        print(f"== {name}", flush=True)
        getattr(bench, name.replace("-", "_"))()


if __name__ == "__main__":
    main()
