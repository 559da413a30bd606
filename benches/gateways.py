#!/usr/bin/env python3
"""Requests and events a second of the gateway over its mock engine, and of the same server behind other gateways, in turns, in one run.

    cargo build --release --examples
    python3 -m venv .venv-gateways && .venv-gateways/bin/pip install sglang-router==0.3.2 vllm-router==0.1.17
    .venv-gateways/bin/python benches/gateways.py

The mock server, the gateway in front of it and the client share this machine. What a gateway costs is the difference from `direct`.
"""
import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "target" / "release" / "examples"
BIN = pathlib.Path(sys.executable).parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def commands(worker):
    """The command of each gateway, but for its port."""
    route = ["--policy", "round_robin", "--host", "127.0.0.1", "--worker-urls", worker]
    return {
        "sglang-router": [sys.executable, "-m", "sglang_router.launch_router", *route, "--prometheus-port", str(free_port())],
        "vllm-router": [str(BIN / "vllm-router"), *route, "--prometheus-port", str(free_port())],
    }


def start(command, url, log):
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
            return process
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                raise RuntimeError(f"{command[0]} did not start; see {log.name}")
            time.sleep(0.2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=pathlib.Path, default=EXAMPLES, help="where mock_server and load_test are")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    worker = f"http://127.0.0.1:{free_port()}"
    processes, urls = [], {"direct": worker}
    with open(os.path.join(tempfile.gettempdir(), "gateways.log"), "w") as log:
        try:
            mock = [str(args.examples / "mock_server"), "--port", worker.rsplit(":", 1)[1], "--output-tokens", str(args.tokens)]
            processes.append(start(mock, worker, log))
            for name, command in commands(worker).items():
                port = free_port()
                urls[name] = f"http://127.0.0.1:{port}"
                processes.append(start([*command, "--port", str(port)], urls[name], log))
            for number in range(args.rounds):
                for name, url in urls.items():
                    command = [str(args.examples / "load_test"), "rate", "--url", url, "--streams", str(args.streams), "--tokens", str(args.tokens),
                               "--requests", str(args.requests), "--pid", str(processes[0].pid)]
                    output = subprocess.run(command, capture_output=True, text=True)
                    print(f"round {number}, {name}: {(output.stdout or output.stderr).strip()}", flush=True)
        finally:
            for process in processes:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


if __name__ == "__main__":
    main()
