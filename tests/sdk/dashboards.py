#!/usr/bin/env python3
"""Run every query of the dashboards and every recording rule against a real Prometheus that scrapes a real server under load.

    python tests/sdk/dashboards.py --server target/debug/polylora --prometheus /usr/bin/prometheus

Each must give data; Grafana itself is not needed for that.
"""
import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
DEMO = os.path.join(os.path.dirname(os.path.dirname(HERE)), "demo")
GRAFANA = os.path.join(os.path.dirname(os.path.dirname(HERE)), "grafana")
ADAPTERS = ["lines", "table", "json", "pirate", "sql", "upper", "flags", "yaml", "guest", None]


def query(port, expression):
    """The samples of an instant query: a list of (labels, value)."""
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(url, timeout=10) as response:
        result = json.load(response)["data"]["result"]
    return [(sample["metric"], float(sample["value"][1])) for sample in result]


def expressions():
    for name in sorted(os.listdir(os.path.join(GRAFANA, "dashboards"))):
        with open(os.path.join(GRAFANA, "dashboards", name), encoding="utf-8") as file:
            for panel in json.load(file)["panels"]:
                for target in panel.get("targets", []):
                    expression = target["expr"].replace("$__rate_interval", "20s").replace("$instance", ".*").replace("$adapter", ".*")
                    yield f"{name}, {panel['title']}", expression
    with open(os.path.join(GRAFANA, "rules.yml"), encoding="utf-8") as file:
        for name in re.findall(r"- record: (\S+)", file.read()):
            yield "rules.yml", name


def variant(folder, number):
    """A copy of an adapter with another scaling."""
    out = os.path.join(folder, f"variant-{number}")
    shutil.copytree(os.path.join(DEMO, "adapters", "json"), out)
    path = os.path.join(out, "adapter_config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    config["lora_alpha"] += number / 16
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True)
    parser.add_argument("--prometheus", default=shutil.which("prometheus"))
    arguments = parser.parse_args()
    if not arguments.prometheus:
        sys.exit("no prometheus found: give --prometheus")
    os.environ["POLYLORA"] = os.path.abspath(arguments.server)
    sys.path.insert(0, HERE)
    from server import LIST_3, Server, free_port

    port = free_port()
    with Server("--max-loras-per-batch", "2") as server, tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(GRAFANA, "prometheus.yml"), encoding="utf-8") as file:
            config = file.read()
        config = config.replace("127.0.0.1:30000", server.url.removeprefix("http://")).replace("scrape_interval: 5s", "scrape_interval: 1s")
        config = config.replace("evaluation_interval: 15s", "evaluation_interval: 1s").replace("- rules.yml", f"- {GRAFANA}/rules.yml")
        with open(os.path.join(folder, "prometheus.yml"), "w", encoding="utf-8") as file:
            file.write(config)
        prometheus = subprocess.Popen([arguments.prometheus, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                                       f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"])
        try:
            status, answer = server.request("PUT", "/v1/aliases/support", {"targets": [{"adapter": "json"}, {"adapter": "yaml"}]})
            assert status == 200, answer
            missing, versions, deadline = list(expressions()), 0, time.monotonic() + 60
            while missing and time.monotonic() < deadline:
                # All adapters in one batch, and one that comes and goes: each time another version, which no tier can hold yet.
                versions += 1
                calls = [("/load_lora_adapter", {"lora_name": "guest", "lora_path": variant(folder, versions)}),
                         ("/generate", {"text": [LIST_3] * len(ADAPTERS), "lora_path": ADAPTERS, "sampling_params": {"max_new_tokens": 32}}),
                         ("/generate", {"text": LIST_3, "lora_path": "support", "sampling_params": {"max_new_tokens": 8}}),
                         ("/unload_lora_adapter", {"lora_name": "guest"})]
                for path, body in calls:
                    status, answer = server.post(path, body)
                    assert status == 200, answer
                time.sleep(0.2)                 # a load, not a wait: the loop ends when every query has data
                try:
                    missing = [(place, expression) for place, expression in missing
                               if not any(math.isfinite(value) for _, value in query(port, expression))]
                except OSError:                 # Prometheus is not up yet
                    continue
        finally:
            prometheus.terminate()
            prometheus.wait(timeout=20)
    for place, expression in missing:
        print(f"no data: {place}: {expression}", file=sys.stderr)
    print(f"dashboards: {len(list(expressions()))} queries, {len(missing)} without data")
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
