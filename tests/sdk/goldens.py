#!/usr/bin/env python3
"""Asks a running server of the demo model for every golden answer, all adapters and the base in one /generate call, and compares token ids.

    python tests/sdk/goldens.py --url http://127.0.0.1:30000 [--rounds 5]
    python tests/sdk/goldens.py --golden models/goldens/smollm2-135m.json --tolerance 0.2      # of benches/real_models.py

With a tolerance, an answer may leave the golden one at a token that PEFT, in f32, preferred by no more than that (in log-probability): a model in bf16
does. Needs nothing but Python, so that it also runs where a GPU is.
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
    parser.add_argument("--golden", type=pathlib.Path, nargs="*", help="golden files; default: the demo model's")
    parser.add_argument("--tolerance", type=float, default=0.0)
    args = parser.parse_args()
    cases = []
    for path in args.golden or sorted(GOLDEN.glob("*.json")):
        golden = json.loads(path.read_text())
        # A sum of adapters says in each case what it is; a real model's file has the cases of all its adapters.
        cases += [(case.get("lora_path", case.get("adapter", golden.get("adapter"))), case) for case in golden["cases"]]
    assert len({name for name, _ in cases}) > 3, "golden files of the base and several adapters"
    for round_idx in range(args.rounds):
        random.Random(round_idx).shuffle(cases)
        body = {
            "input_ids": [case["prompt_ids"] for _, case in cases],
            "lora_path": [name for name, _ in cases],
            "sampling_params": {"temperature": 0, "max_new_tokens": max(len(case["output_ids"]) for _, case in cases)},
        }
        request = urllib.request.Request(args.url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
        begin = time.time()
        answers = json.load(urllib.request.urlopen(request, timeout=120))
        seconds = time.time() - begin
        wrong, num_left = [], 0
        for (name, case), answer in zip(cases, answers, strict=True):
            expected, got = case["output_ids"], answer["output_ids"][: len(case["output_ids"])]
            if answer["meta_info"]["lora"] != name:
                wrong.append((name, answer["meta_info"]["lora"]))
            elif got != expected:
                leaves = next((index for index, pair in enumerate(zip(expected, got)) if pair[0] != pair[1]), len(got))
                if leaves == len(got) or case.get("margins", [1e9] * len(expected))[leaves] > args.tolerance:
                    wrong.append((name, leaves, got, expected))
                num_left += 1
        tokens = sum(answer["meta_info"]["completion_tokens"] for answer in answers)
        close = f" ({num_left - len(wrong)} of them left it at a close token)" if args.tolerance else ""
        print(f"round {round_idx}: {len(cases) - len(wrong)} of {len(cases)} right{close}, {tokens} tokens in {seconds:.3f} s")
        assert not wrong, wrong[0]


if __name__ == "__main__":
    main()
