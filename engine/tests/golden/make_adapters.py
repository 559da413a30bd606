"""Makes small adapters of every kind that is applied, and what PEFT computes with them.

    python engine/tests/golden/make_adapters.py      # writes adapters/ and adapters.json beside this file

Each adapter is put on a base model of tests/fixtures, given random weights, saved by PEFT, and loaded again by
`PeftModel.from_pretrained` on a fresh base; the golden numbers are what that model computes in f32. Versions and seed are in the file.
"""

import copy
import json
import pathlib
import shutil
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")

HERE = pathlib.Path(__file__).resolve().parent
FIXTURES = HERE.parents[2] / "tests" / "fixtures"
SEED = 5
PROMPT = [23, 88, 161, 211, 98, 130, 82, 234, 64, 148]
NEW_TOKENS = 6
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name -> (base, LoraConfig, dtype of the saved file). A pair on an embedding is saved beside a copy of the base's weight, which PEFT
# loads over the base's: its dtype must be one that rounds nothing.
CASES = {
    "plain_f16": ("tiny-llama3", dict(r=4, lora_alpha=8, target_modules=ALL), torch.float16),
    "plain_bf16": ("tiny-llama3", dict(r=4, lora_alpha=8, target_modules="all-linear"), torch.bfloat16),
    "rslora_patterns": (
        "tiny-llama3",
        dict(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=ALL,
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 7},
            alpha_pattern={"o_proj": 3, "0.mlp.up_proj": 11},
        ),
        None,
    ),
    "regex_lookahead": ("tiny-llama3", dict(r=3, target_modules=r"^(?!.*layers\.0\.mlp).*\.(?:up_proj|v_proj|down_proj)$"), None),
    "one_layer": ("tiny-llama3", dict(r=3, target_modules=["k_proj", "gate_proj"], layers_to_transform=1, layers_pattern="layers"), None),
    "excluded": ("tiny-llama3", dict(r=3, target_modules="all-linear", exclude_modules=["0.self_attn.q_proj", "down_proj"]), None),
    "fan_in_fan_out": ("tiny-llama3", dict(r=3, target_modules=["o_proj", "down_proj"], fan_in_fan_out=True), None),
    "embedding_and_head": ("tiny-llama3", dict(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head", "q_proj"]), torch.float16),
    "embedding_alone": ("tiny-llama3", dict(r=3, lora_alpha=5, use_rslora=True, target_modules=["embed_tokens"]), torch.float16),
    "head_alone": ("tiny-llama3", dict(r=3, lora_alpha=5, target_modules=["lm_head"]), torch.float16),
    "embedding_and_head_tied": ("tiny-qwen2", dict(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head"]), None),
    "dora": ("tiny-llama3", dict(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear"), None),
    "dora_rslora_patterns": (
        "tiny-llama3",
        dict(r=4, lora_alpha=8, use_dora=True, use_rslora=True, target_modules=ALL, rank_pattern={"v_proj": 2}, alpha_pattern={"up_proj": 3}),
        None,
    ),
    "dora_embedding_and_head": ("tiny-llama3", dict(r=2, use_dora=True, target_modules=["embed_tokens", "lm_head", "k_proj"]), torch.float16),
    "dora_biases": ("tiny-qwen2", dict(r=4, use_dora=True, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"]), None),
    "dora_trained_biases": ("tiny-qwen2", dict(r=4, use_dora=True, bias="all", target_modules=["q_proj", "v_proj"]), None),
    "lora_bias": ("tiny-llama3", dict(r=4, lora_alpha=8, lora_bias=True, target_modules=ALL + ["lm_head"]), torch.float16),
    "bias_lora_only": ("tiny-qwen2", dict(r=4, bias="lora_only", target_modules=["q_proj", "o_proj"]), None),
    "bias_all": ("tiny-qwen2", dict(r=4, bias="all", target_modules=["q_proj", "o_proj"]), None),
    "bias_all_without_biases": ("tiny-llama3", dict(r=4, bias="all", target_modules=["q_proj", "o_proj"]), None),
    "bias_all_and_lora_bias": ("tiny-qwen2", dict(r=4, bias="all", lora_bias=True, target_modules=["q_proj", "down_proj"]), None),
    "saved_head": ("tiny-llama3", dict(r=4, target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]), torch.bfloat16),
    "saved_embedding": ("tiny-llama3", dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]), torch.bfloat16),
    "saved_both": ("tiny-llama3", dict(r=4, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"]), torch.bfloat16),
    "saved_embedding_tied": ("tiny-qwen2", dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]), torch.bfloat16),
    "saved_head_tied": ("tiny-qwen2", dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), torch.bfloat16),
    "tying_targets": (
        "tiny-qwen2",
        dict(r=3, lora_alpha=6, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True, alpha_pattern={"lm_head": 10}),
        None,
    ),
    "tying_saved": ("tiny-qwen2", dict(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True), torch.float16),
}


# Weighted sums of deltas, as `add_weighted_adapter(..., combination_type="cat")` makes them.
COMBINATIONS = [
    ("tiny-llama3", {"plain_f16": 1.0, "one_layer": 1.0}),
    ("tiny-llama3", {"plain_bf16": 0.7, "rslora_patterns": -0.3}),
    ("tiny-llama3", {"excluded": 0.5}),
    ("tiny-llama3", {"plain_f16": 0.4, "one_layer": 1.5, "fan_in_fan_out": -1.0}),
]


def load_base(name: str):
    model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32)
    return model.eval()


def randomise(model, generator) -> None:
    """Every trained parameter gets values that matter."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_" in name and "bias" not in name:
                parameter.copy_(0.3 * noise)
            elif "bias" in name:
                parameter.add_(0.3 * noise)
            else:
                parameter.add_(0.05 * noise)


def greedy(model, prompt: list[int]) -> dict:
    ids, top = list(prompt), []
    with torch.no_grad():
        for step in range(NEW_TOKENS):
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
            if step == 0:
                for row in logprobs[:-1]:
                    values, tokens = row.topk(5)
                    top.append([[int(t), round(float(v), 6)] for t, v in zip(tokens, values)])
            values, tokens = logprobs[-1].topk(5)
            assert values[0] - values[1] > 1e-3, "a greedy choice that rounding could change"
            top.append([[int(t), round(float(v), 6)] for t, v in zip(tokens, values)])
            ids.append(int(tokens[0]))
    return {"output_ids": ids[len(prompt) :], "top_logprobs": top}


def make(name: str, base_name: str, config: dict, dtype) -> dict:
    folder = HERE / "adapters" / name
    for seed in range(SEED, SEED + 20):
        generator = torch.Generator().manual_seed(seed)
        model = get_peft_model(load_base(base_name), LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(config)))
        randomise(model, generator)
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        config_file = folder / "adapter_config.json"
        saved = json.loads(config_file.read_text())
        # The folder that the base came from is this machine's.
        saved["base_model_name_or_path"] = base_name
        if isinstance(saved.get("target_modules"), list):
            saved["target_modules"].sort()
        config_file.write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")
        weights = folder / "adapter_model.safetensors"
        if dtype is not None:
            save_file({key: value.to(dtype) for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
        reloaded = PeftModel.from_pretrained(load_base(base_name), folder).eval()
        try:
            answer = greedy(reloaded, PROMPT)
        except AssertionError:
            continue
        return {"name": name, "base": base_name, "seed": seed, **answer}
    raise SystemExit(f"{name}: no seed gives clear choices")


def combine(base_name: str, weights: dict) -> dict:
    first, *others = weights
    model = PeftModel.from_pretrained(load_base(base_name), HERE / "adapters" / first, adapter_name=first)
    for name in others:
        model.load_adapter(HERE / "adapters" / name, adapter_name=name)
    model.add_weighted_adapter(list(weights), list(weights.values()), "combined", combination_type="cat")
    model.set_adapter("combined")
    return {"base": base_name, "weights": weights, **greedy(model.eval(), PROMPT)}


def main() -> None:
    cases = [make(name, *case) for name, case in CASES.items()]
    combinations = [combine(*combination) for combination in COMBINATIONS]
    bases = {name: greedy(load_base(name), PROMPT) for name in sorted({case["base"] for case in cases})}
    for case in cases:
        base = bases[case["base"]]
        moved = max(abs(a[0][1] - b[0][1]) for a, b in zip(case["top_logprobs"], base["top_logprobs"]))
        assert moved > 0.05, f"{case['name']} changes nothing"
    head = {
        "made_by": "engine/tests/golden/make_adapters.py",
        "versions": {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "about": "f32. top_logprobs: the five best [token id, log-probability] of the next token after each prompt token and each output token but the last.",
        "prompt_ids": PROMPT,
        "bases": bases,
    }
    text = json.dumps(head)[:-1]
    lines = ",\n".join(json.dumps(case) for case in cases)
    sums = ",\n".join(json.dumps(case) for case in combinations)
    (HERE / "adapters.json").write_text(f'{text}, "cases": [\n{lines}\n], "combinations": [\n{sums}\n]}}\n')
    print(f"{len(cases)} adapters")


if __name__ == "__main__":
    main()
