#!/usr/bin/env python3
"""Hold the running gateway against its OpenAPI document, over an engine that answers at once (examples/mock_server.rs).

    pip install --requirement tests/contract/requirements.txt && npm ci --prefix tests/contract/typescript
    cargo build --example mock_server && python tests/contract/run.py --server target/debug/examples/mock_server

schemathesis sends what the document allows and what it forbids to every route, those that load, unload, flush and abort included: no status that
the document does not name, no answer that its schema does not allow, no 5xx, nothing forbidden that is accepted. Then a Python and a TypeScript
client are generated from the document, and each makes calls.
"""
import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
DOCUMENT = HERE.parents[1] / "openapi" / "openapi.json"
BIN = pathlib.Path(sys.executable).parent

# Left out: `positive_data_acceptance`, since what a document can't say (that a model exists, that a prompt fits) may be refused, and
# `ensure_resource_availability`, which does not know that POST /unload_lora_adapter takes away what POST /v1/loras has made.
CHECKS = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
          "response_schema_conformance", "negative_data_rejection", "missing_required_header", "unsupported_method", "allow_header_conformance",
          "use_after_free", "ignored_auth"]
# A run of which hardly a request was answered would prove little: these routes, with so many answers of status 200 at least.
ANSWERED = {"/v1/chat/completions": 20, "/v1/completions": 20, "/v1/responses": 20, "/generate": 20, "/tokenize": 10, "/detokenize": 5,
            "/load_lora_adapter": 5, "/unload_lora_adapter": 2, "/v1/load_lora_adapter": 5, "/v1/unload_lora_adapter": 2, "/v1/loras": 5,
            "/pin_lora_adapter": 1, "/v1/aliases/{name}": 5, "/flush_cache": 1, "/abort_request": 1, "/v1/models": 1, "/metrics": 1}
STREAMED = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate"]


class MockServer:
    """The gateway over the mock engine on a free port; its log must hold no warning and no error."""

    def __init__(self, binary, *flags):
        self.command = [binary, "--port", "0", *flags]

    def __enter__(self):
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.url = self.process.stdout.readline().split()[-1]
        return self

    def __exit__(self, kind, *_):
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=30)
        with open(self.log.name, encoding="utf-8", errors="replace") as file:
            log = file.read()
        if kind is None and (status or log):
            sys.exit(f"the server ended with {status} and logged:\n{log}")


def statuses(url):
    """{route: {status: count}} as the server counted; what it tells by adapter may be a second old, and /metrics has just been asked."""
    time.sleep(1.1)
    table = {}
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        for line in response.read().decode().splitlines():
            if line.startswith("polylora_http_requests_total{"):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
                counts = table.setdefault(labels["route"], {})
                counts[labels["status"]] = counts.get(labels["status"], 0) + int(float(line.rsplit(" ", 1)[1]))
    return table


def document():
    """The checked-in document, which a test of the gateway's holds to be the served one, with streams as schemathesis reads them.

    What the document gives for `text/event-stream` is the schema of an event's data, as OpenAI's own document does. Before OpenAPI 3.2 there is
    no way to say that it is one, and that `[DONE]` is not.
    """
    with open(DOCUMENT, encoding="utf-8") as file:
        spec = json.load(file)
    for item in spec["paths"].values():
        for operation in item.values():
            for response in operation["responses"].values():
                stream = response.get("content", {}).get("text/event-stream")
                if stream:
                    data = {"anyOf": [stream["schema"], {"$ref": "#/components/schemas/ErrorBody"}, {"$ref": "#/components/schemas/NativeErrorBody"}]}
                    event = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
                    stream["schema"] = {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [{"const": "[DONE]"}, event]}}}
    return spec


def schemathesis(binary, examples, seed, *more, flags=()):
    """The exit status of a run; what the server counted; how many streams each route sent."""
    with MockServer(binary, *flags) as server, tempfile.TemporaryDirectory() as folder:
        path, streams = os.path.join(folder, "openapi.json"), os.path.join(folder, "streams.json")
        for name, content in ((path, document()), (streams, {})):
            with open(name, "w", encoding="utf-8") as file:
                json.dump(content, file)
        command = [BIN / "schemathesis", "--no-color", "run", path, "--url", server.url, "--checks", ",".join(CHECKS), "--seed", seed,
                   "--max-examples", examples, "--generation-database", "none", "--suppress-health-check", "all", "--continue-on-failure",
                   "--warnings", "off", "--request-timeout", "20", "--output-sanitize", "false", *more]
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HERE / "hooks.py"), "CONTRACT_STREAMS": streams}
        status = subprocess.run([str(part) for part in command], cwd=folder, env=environment).returncode
        with open(streams, encoding="utf-8") as file:
            return status, statuses(server.url), json.load(file)


def contract(binary, examples, seed):
    status, table, streams = schemathesis(binary, examples, seed)
    for route, counts in sorted(table.items()):
        print(f"{route:32} " + "  ".join(f"{status}: {count}" for status, count in sorted(counts.items())))
    print(f"streams: {streams}")
    few = [f"{route}: {table.get(route, {}).get('200', 0)} of {least}" for route, least in ANSWERED.items()
           if table.get(route, {}).get("200", 0) < least]
    few += [f"{route}: {streams.get(route, 0)} streams" for route in STREAMED if streams.get(route, 0) < 5]
    if few:
        print("too few requests were answered with 200: " + "; ".join(few))
    # Once more with a key asked for and none given, shortly: every answer but a probe's is a 401 that the document names.
    locked, table, _ = schemathesis(binary, 2, seed, "--phases", "examples,fuzzing", "--mode", "positive", flags=("--api-key", "sesame"))
    answered = [route for route in ANSWERED if route != "/metrics" and set(table.get(route, {})) != {"401"}]
    if answered:
        print(f"answered without a key: {answered}")
    return not (status or few or locked or answered)


def generated_python_client(url):
    """The generator must understand all of the document: what it can't parse it leaves out, with a warning."""
    with tempfile.TemporaryDirectory() as folder:
        command = [BIN / "openapi-python-client", "generate", "--path", DOCUMENT, "--meta", "none", "--output-path", os.path.join(folder, "polylora_client"),
                   "--fail-on-warning"]
        environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": folder}
        subprocess.run([str(part) for part in command], check=True, env=environment)
        subprocess.run([sys.executable, "-m", "compileall", "-q", folder], check=True)
        subprocess.run([sys.executable, str(HERE / "python_client.py"), url], check=True, env=environment)


def generated_typescript_client(url):
    folder = HERE / "typescript"
    # A field with a default may be left out of a request.
    types = ["npx", "openapi-typescript", str(DOCUMENT), "--output", "schema.d.ts", "--default-non-nullable", "false"]
    for command in (types, ["npx", "tsc"], ["node", "build/client.js", url]):
        subprocess.run(command, cwd=folder, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="the example mock_server's binary")
    parser.add_argument("--examples", type=int, default=60, help="random requests to each route")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    binary = os.path.abspath(args.server)
    if not contract(binary, args.examples, args.seed):
        sys.exit("the server and its document disagree")
    with MockServer(binary) as server:
        generated_python_client(server.url)
        generated_typescript_client(server.url)


if __name__ == "__main__":
    main()
