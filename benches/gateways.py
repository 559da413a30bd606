#!/usr/bin/env python3
"""What the gateway costs over its mock engine, above the floor of any server here, and how fast it is beside and behind other gateways.

    cargo build --release --bin polylora --examples
    python3 -m venv .venv-gateways && .venv-gateways/bin/pip install sglang-router==0.3.2 vllm-router==0.1.17
    .venv-gateways/bin/python benches/gateways.py [cost] [paced] [first-token] [open] [scrape] [routers]

The server, the client and what is between them share this machine: nothing else should run on it. Each answer is checked by the client to
its last event. For `paced` and `first-token` the server has one core and the client another. `scrape` asks an idle server of the demo model
for /metrics every 50 ms. `routers` puts the same mock server behind each router, in turns; what a router costs is the difference from `direct`.
"""
import argparse
import contextlib
import os
import pathlib
import resource
import socket
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "sdk"))
from routers import ROUTERS, Router  # noqa: E402
import server as demo  # noqa: E402
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


def cpu_seconds(pid):
    """CPU of all threads, by the scheduler's own clock; /proc/PID/stat tells it in steps of 10 ms."""
    return sum(int(task.read_text().split()[0]) for task in pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def scrape(server, path, interval=0.05, seconds=20):
    """Asks for a path every so often on one connection; the size of an answer, times to its first byte and to its last, CPU for each."""
    host, port = server.url.removeprefix("http://").split(":")
    firsts, lasts, size = [], [], 0
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        before, due = cpu_seconds(server.process.pid), time.monotonic()
        for _ in range(int(seconds / interval)):
            time.sleep(max(0, due - time.monotonic()))
            due += interval
            began = time.perf_counter()
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            answer = connection.recv(1 << 20)
            firsts.append(time.perf_counter() - began)
            head, _, body = answer.partition(b"\r\n\r\n")
            size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            left = size - len(body)
            while left > 0:
                left -= len(connection.recv(1 << 20))
            lasts.append(time.perf_counter() - began)
        cpu = (cpu_seconds(server.process.pid) - before) / len(firsts)
    return size, sorted(firsts), sorted(lasts), cpu


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

    def scrape(self):
        demo.BINARY = str(self.examples.parent / "polylora")
        for adapters in (0, 100):
            with demo.Server("--metrics-max-adapters", "100") as server:
                for number in range(adapters):
                    loaded = {"lora_name": f"adapter-{number}", "lora_path": demo.adapter_path("json")}
                    demo_answer = server.post("/load_lora_adapter", loaded)
                    assert demo_answer[0] == 200, demo_answer
                    asked = {"model": f"demo:adapter-{number}", "prompt": "1", "max_tokens": 4}
                    demo_answer = server.post("/v1/completions", asked)
                    assert demo_answer[0] == 200, demo_answer
                for path in ("/health", "/metrics"):
                    size, firsts, lasts, cpu = scrape(server, path)
                    at = lambda times, share: f"{times[int(share * (len(times) - 1))] * 1e3:.2f}"  # noqa: E731
                    print(f"{adapters} more adapters, {path}: {size} bytes, first byte p50 {at(firsts, .5)} p95 {at(firsts, .95)} p99 "
                          f"{at(firsts, .99)} ms, last p50 {at(lasts, .5)} p95 {at(lasts, .95)} ms, CPU {cpu * 1e3:.3f} ms", flush=True)

    def routers(self):
        with MockServer(self.examples, "--output-tokens", "64") as server, contextlib.ExitStack() as stack:
            urls = {"direct": server.url, **{name: stack.enter_context(Router(name, [server.url])).url for name in ROUTERS}}
            for number in range(3):
                for tokens, requests in (("1", "4000"), ("64", "2000")):
                    for name, url in urls.items():
                        print(f"round {number}, {name}: ", end="", flush=True)
                        self.load(server, "rate", "--streams", "64", "--tokens", tokens, "--requests", requests, url=url)


def main():
    names = ["cost", "paced", "first-token", "open", "scrape", "routers"]
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
