#!/usr/bin/env python3
"""Golden answers from a running server of the demo model while adapters are loaded, replaced, evicted and unloaded under traffic.

    python tests/sdk/churn.py --url http://127.0.0.1:30000 [--seconds 20] [--clients 16]

Serve with `--max-loras-per-batch 2 --max-loaded-loras 4`, so that adapters also leave the device and host memory. The server reads the folders of
demo/adapters itself: it must run on this machine. Needs nothing but Python, so that it also runs where a GPU is.
"""
import argparse
import json
import pathlib
import random
import threading
import time
import urllib.error
import urllib.request

DEMO = pathlib.Path(__file__).resolve().parents[2] / "demo"
NAMES = [f"churn-{index}" for index in range(6)]


def cases_of(name):
    cases = json.loads((DEMO / "golden" / f"{name or 'base'}.json").read_text())["cases"]
    return [(case["prompt_ids"], case["output_ids"]) for case in cases]


class Churn:
    def __init__(self, url):
        self.url = url
        self.sources = sorted(path.name for path in (DEMO / "adapters").iterdir() if path.is_dir())
        self.cases = {name: cases_of(name) for name in [None, *self.sources]}
        self.lock = threading.Lock()
        # What each name stands for, and all that it has stood for: (source or None, time from, time to). During a change, both.
        self.history = {name: [[None, 0.0, float("inf")]] for name in NAMES}
        self.counts = {"answers": 0, "gone": 0, "busy": 0, "load": 0, "replace": 0, "unload": 0}
        self.faults = []
        self.end = 0.0

    def post(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def meanings(self, name, begin, end):
        """Everything that `name` may have stood for between two moments."""
        with self.lock:
            return {source for source, start, until in self.history[name] if start <= end and until >= begin}

    def change(self, rng):
        """One load, replacement or unload. From before the call to its end the name may stand for the old and for the new."""
        name = rng.choice(NAMES)
        old = self.history[name][-1]
        source = rng.choice(self.sources)
        what = "load" if old[0] is None else rng.choice(["replace", "unload"])
        new = [None if what == "unload" else source, time.monotonic(), float("inf")]
        with self.lock:
            self.history[name].append(new)
        if what == "unload":
            status, body = self.post("/unload_lora_adapter", {"lora_name": name})
        else:
            load = {"lora_name": name, "lora_path": str(DEMO / "adapters" / source), "replace": what == "replace"}
            status, body = self.post("/load_lora_adapter", load)
        if status == 503:
            # Everything in host memory is in use just now.
            what = "busy"
        elif status != 200:
            self.faults.append((what, name, source, status, body))
        with self.lock:
            if what == "busy":
                new[2] = time.monotonic()
                old[1], old[2] = min(old[1], new[1]), float("inf")
                self.history[name][-2:] = [new, old]
            else:
                old[2] = time.monotonic()
            self.counts[what] += 1

    def ask(self, rng):
        name = rng.choice([None, *self.sources, *NAMES, *NAMES])
        begin = time.monotonic()
        if name in NAMES:
            guess = self.meanings(name, begin, begin)
            prompt = rng.choice(self.cases[next(iter(guess))])[0]
        else:
            prompt = rng.choice(self.cases[name])[0]
        parameters = {"temperature": 0, "max_new_tokens": 64}
        status, body = self.post("/generate", {"input_ids": prompt, "lora_path": name, "sampling_params": parameters})
        wanted = self.meanings(name, begin, time.monotonic()) if name in NAMES else {name}
        if status == 503 and name in NAMES:
            # Its new version is being read just now.
            self.counts["busy"] += 1
            return
        if status != 200:
            if None in wanted and name in NAMES and status in (400, 404):
                self.counts["gone"] += 1
            else:
                self.faults.append(("generate", name, wanted, status, body))
            return
        known = [dict((tuple(asked), output) for asked, output in self.cases[source]).get(tuple(prompt)) for source in wanted - {None} or {None}]
        if None in known:
            return  # It may have come from an adapter that has no golden answer to this prompt.
        if not any(body["output_ids"][: len(output)] == output[:64] for output in known):
            self.faults.append(("generate", name, wanted, prompt, body["output_ids"], known))
        self.counts["answers"] += 1

    def run(self, work, seed):
        rng = random.Random(seed)
        try:
            while time.monotonic() < self.end and not self.faults:
                work(rng)
        except Exception as error:  # noqa: BLE001: a thread's failure is the check's
            self.faults.append(("client", repr(error)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    churn = Churn(arguments.url)
    for name in NAMES:
        churn.post("/unload_lora_adapter", {"lora_name": name})  # of an earlier run
    churn.end = time.monotonic() + arguments.seconds
    work = [churn.change] + [churn.ask] * arguments.clients
    threads = [threading.Thread(target=churn.run, args=(one, seed)) for seed, one in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(", ".join(f"{count} {what}" for what, count in churn.counts.items()))
    assert not churn.faults, churn.faults[0]
    assert churn.counts["answers"] > 20 and churn.counts["replace"] > 2 and churn.counts["unload"] > 2, churn.counts


if __name__ == "__main__":
    main()
