#!/usr/bin/env python3
"""Asks a running server of the demo model for every golden answer, all adapters and the base in one /generate call, and compares token ids.

    python tests/sdk/goldens.py --url http://127.0.0.1:30000 [--rounds 5]

Needs nothing but Python, so that it also runs where a GPU is.
"""
import argparse
import json
import pathlib
import random
import time
import urllib.request

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "demo" / "golden"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cases = []
    for path in sorted(GOLDEN.glob("*.json")):
        golden = json.loads(path.read_text())
        # A sum of adapters says in each case what it is.
        cases += [(case.get("lora_path", golden["adapter"]), case["prompt_ids"], case["output_ids"]) for case in golden["cases"]]
    assert len({name for name, _, _ in cases}) > 4, "golden files of the base and several adapters"
    for round_idx in range(args.rounds):
        random.Random(round_idx).shuffle(cases)
        body = {
            "input_ids": [prompt for _, prompt, _ in cases],
            "lora_path": [name for name, _, _ in cases],
            "sampling_params": {"temperature": 0, "max_new_tokens": max(len(output) for _, _, output in cases)},
        }
        request = urllib.request.Request(args.url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
        begin = time.time()
        answers = json.load(urllib.request.urlopen(request, timeout=120))
        seconds = time.time() - begin
        wrong = [
            (name, answer["output_ids"][: len(output)], output)
            for (name, _, output), answer in zip(cases, answers, strict=True)
            if answer["output_ids"][: len(output)] != output or answer["meta_info"]["lora"] != name
        ]
        tokens = sum(answer["meta_info"]["completion_tokens"] for answer in answers)
        print(f"round {round_idx}: {len(cases) - len(wrong)} of {len(cases)} right, {tokens} tokens in {seconds:.3f} s")
        assert not wrong, wrong[0]


if __name__ == "__main__":
    main()
