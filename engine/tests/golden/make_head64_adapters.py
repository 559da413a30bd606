"""Adapters as make_adapters.py makes them, on bases with heads of 64, which the GPU computes as well; weights in bf16, which it keeps as they are.

    python engine/tests/golden/make_head64_adapters.py            # writes into adapters/, and head64_adapters.json beside this file
    python engine/tests/golden/make_head64_adapters.py NAME ...   # makes these cases alone and leaves the others as they are
"""

import sys

import torch
from make_adapters import ALL, write

LLAMA, QWEN = "tiny-llama-head64", "tiny-qwen2-head64"
CASES = {
    "plain": (LLAMA, dict(r=4, lora_alpha=8, target_modules="all-linear")),
    "sharded": (LLAMA, dict(r=5, lora_alpha=7, use_rslora=True, target_modules=ALL + ["lm_head"])),
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
# As in make_adapters.py. Vocabularies that are a multiple of 8, which the GPU's kernels like, and others.
TOKEN_CASES = {
    "tokens_saved": (LLAMA, 261, dict(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "tokens_saved_of_8": (LLAMA, 264, dict(r=4, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "tokens_untrained_rows": (LLAMA, 259, dict(r=4, target_modules=["q_proj", "v_proj"])),
    "tokens_pairs": (LLAMA, 260, dict(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "tokens_pairs_of_8": (LLAMA, 272, dict(r=18, lora_alpha=5, target_modules=["embed_tokens", "lm_head"])),
    "tokens_pairs_dora": (LLAMA, 258, dict(r=2, use_dora=True, target_modules=["embed_tokens", "lm_head", "k_proj"])),
    "tokens_indices": (LLAMA, 260, dict(r=3, target_modules=["v_proj"], trainable_token_indices=[259, 256, 257, 258, 17])),
    "tokens_fewer": (LLAMA, 243, dict(r=3, target_modules=["v_proj"])),
    "tokens_tied": (QWEN, 262, dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tokens_tied_saved_embedding": (QWEN, 264, dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "tokens_tied_pairs": (QWEN, 259, dict(r=3, target_modules=["embed_tokens", "q_proj"])),
    "tokens_tied_indices": (QWEN, 258, dict(r=3, target_modules=["q_proj"], trainable_token_indices=[256, 257])),
    "rows_embedding": (LLAMA, None, dict(r=3, target_modules=["v_proj"], trainable_token_indices=[234, 3, 88])),
    "rows_both": (LLAMA, None, dict(r=3, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [88, 64], "lm_head": [11, 200, 5]})),
    "rows_tied": (QWEN, None, dict(r=3, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [64, 98, 3]})),
    "rows_tied_apart": (
        QWEN,
        None,
        dict(r=3, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [64, 98], "lm_head": [5, 64]}),
    ),
    "rows_tied_head": (QWEN, None, dict(r=3, target_modules=["v_proj"], trainable_token_indices={"lm_head": [5, 64]})),
}
COMBINATIONS = [(LLAMA, {"head64_plain": 0.7, "head64_few": -1.5})]


def main() -> None:
    cases = {name: (base, config, torch.bfloat16) for name, (base, config) in CASES.items()}
    cases |= {name: (base, config, torch.bfloat16, vocab_size) for name, (base, vocab_size, config) in TOKEN_CASES.items()}
    cases = {f"head64_{name}": case for name, case in cases.items()}
    write("head64_adapters.json", "engine/tests/golden/make_head64_adapters.py", "As adapters.json.", cases, COMBINATIONS, sys.argv[1:])


if __name__ == "__main__":
    main()
