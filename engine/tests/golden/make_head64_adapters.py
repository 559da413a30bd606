"""Adapters as make_adapters.py makes them, on bases with heads of 64, which the GPU computes as well; weights in bf16, which it keeps as they are.

    python engine/tests/golden/make_head64_adapters.py      # writes into adapters/, and head64_adapters.json beside this file
"""

import json

import peft
import torch
import transformers
from make_adapters import ALL, HERE, PROMPT, combine, greedy, load_base, make

LLAMA, QWEN = "tiny-llama-head64", "tiny-qwen2-head64"
CASES = {
    "plain": (LLAMA, dict(r=4, lora_alpha=8, target_modules="all-linear")),
    "few": (LLAMA, dict(r=3, target_modules=["k_proj", "gate_proj"], layers_to_transform=1, layers_pattern="layers")),
    "embedding_and_head": (LLAMA, dict(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "dora": (LLAMA, dict(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear")),
    "dora_rslora_patterns": (
        LLAMA,
        dict(r=20, lora_alpha=8, use_dora=True, use_rslora=True, target_modules=ALL, rank_pattern={"v_proj": 2}, alpha_pattern={"up_proj": 3}),
    ),
    "dora_embedding_and_head": (LLAMA, dict(r=2, use_dora=True, target_modules=["embed_tokens", "lm_head", "k_proj"])),
    "dora_biases": (QWEN, dict(r=4, use_dora=True, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"])),
    "dora_trained_biases": (QWEN, dict(r=4, use_dora=True, bias="all", target_modules=["q_proj", "v_proj"])),
    "lora_bias": (LLAMA, dict(r=4, lora_alpha=8, lora_bias=True, target_modules=ALL + ["lm_head"])),
    "bias_lora_only": (QWEN, dict(r=4, bias="lora_only", target_modules=["q_proj", "o_proj"])),
    "bias_all": (QWEN, dict(r=4, bias="all", target_modules=["o_proj"])),
    "bias_all_and_lora_bias": (QWEN, dict(r=4, bias="all", lora_bias=True, target_modules=["q_proj", "down_proj"])),
    "saved_head": (LLAMA, dict(r=4, target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])),
    "saved_embedding": (LLAMA, dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "saved_both": (LLAMA, dict(r=4, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "saved_head_tied": (QWEN, dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "tying_saved": (QWEN, dict(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
}
COMBINATIONS = [(LLAMA, {"head64_plain": 0.7, "head64_few": -1.5})]


def main() -> None:
    cases = [make(f"head64_{name}", *case, torch.bfloat16) for name, case in CASES.items()]
    head = {
        "made_by": "engine/tests/golden/make_head64_adapters.py",
        "versions": {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "about": "As adapters.json.",
        "prompt_ids": PROMPT,
        "bases": {name: greedy(load_base(name), PROMPT) for name in (LLAMA, QWEN)},
    }
    for case in cases:
        base = head["bases"][case["base"]]
        moved = max(abs(a[0][1] - b[0][1]) for a, b in zip(case["top_logprobs"], base["top_logprobs"]))
        assert moved > 0.05, f"{case['name']} changes nothing"
    lines = ",\n".join(json.dumps(case) for case in cases)
    sums = ",\n".join(json.dumps(combine(*combination)) for combination in COMBINATIONS)
    text = f'{json.dumps(head)[:-1]}, "cases": [\n{lines}\n], "combinations": [\n{sums}\n]}}\n'
    (HERE / "head64_adapters.json").write_text(text)
    print(f"{len(cases)} adapters")


if __name__ == "__main__":
    main()
