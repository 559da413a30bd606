"""Makes small adapters of every kind that is applied, and what PEFT computes with them.

    python engine/tests/golden/make_adapters.py            # writes adapters/ and adapters.json beside this file
    python engine/tests/golden/make_adapters.py NAME ...   # makes these cases alone and leaves the others as they are

Each adapter is put on a base model of tests/fixtures, given random weights, saved by PEFT, and loaded again by
`PeftModel.from_pretrained` on a fresh base; the golden numbers are what that model computes in f32. Versions and seed are in the file.
"""

import copy
import json
import pathlib
import shutil
import sys
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

# name -> (base, vocabulary after `resize_token_embeddings` or None for the base's, LoraConfig). What PEFT saves beside the pairs: both
# embeddings when the vocabulary was resized (`save_embedding_layers` "auto"), else the rows of `trainable_token_indices` alone.
# A prompt has added tokens in it, and the answer emits one at least.
TOKEN_CASES = {
    "tokens_saved": ("tiny-llama3", 261, dict(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "tokens_untrained_rows": ("tiny-llama3", 259, dict(r=4, target_modules=["q_proj", "v_proj"])),
    "tokens_pairs": ("tiny-llama3", 260, dict(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "tokens_pairs_dora": ("tiny-llama3", 258, dict(r=2, use_dora=True, target_modules=["embed_tokens", "lm_head", "k_proj"])),
    "tokens_indices": ("tiny-llama3", 260, dict(r=3, target_modules=["v_proj"], trainable_token_indices=[259, 256, 257, 258, 17])),
    "tokens_fewer": ("tiny-llama3", 240, dict(r=3, target_modules=["v_proj"])),
    "tokens_tied": ("tiny-qwen2", 262, dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tokens_tied_saved_embedding": ("tiny-qwen2", 257, dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "tokens_tied_untrained_rows": ("tiny-qwen2", 260, dict(r=4, target_modules=["k_proj", "v_proj"])),
    "tokens_tied_pairs": ("tiny-qwen2", 259, dict(r=3, target_modules=["embed_tokens", "q_proj"])),
    "tokens_tied_indices": ("tiny-qwen2", 258, dict(r=3, target_modules=["q_proj"], trainable_token_indices=[256, 257])),
    "rows_embedding": ("tiny-llama3", None, dict(r=3, target_modules=["v_proj"], trainable_token_indices=[234, 3, 88])),
    "rows_both": (
        "tiny-llama3",
        None,
        dict(r=3, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [88, 64], "lm_head": [11, 200, 5]}),
    ),
    "rows_tied": ("tiny-qwen2", None, dict(r=3, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [64, 98, 3]})),
    "rows_tied_both": (
        "tiny-qwen2",
        None,
        dict(r=3, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [64, 98], "lm_head": [64, 98]}),
    ),
    "rows_tied_apart": (
        "tiny-qwen2",
        None,
        dict(r=3, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [64, 98], "lm_head": [5, 64]}),
    ),
    "rows_tied_head": ("tiny-qwen2", None, dict(r=3, target_modules=["v_proj"], trainable_token_indices={"lm_head": [5, 64]})),
}


# Weighted sums of deltas, as `add_weighted_adapter(..., combination_type="cat")` makes them.
COMBINATIONS = [
    ("tiny-llama3", {"plain_f16": 1.0, "one_layer": 1.0}),
    ("tiny-llama3", {"plain_bf16": 0.7, "rslora_patterns": -0.3}),
    ("tiny-llama3", {"excluded": 0.5}),
    ("tiny-llama3", {"plain_f16": 0.4, "one_layer": 1.5, "fan_in_fan_out": -1.0}),
]


def load_base(name: str, vocab_size: int | None = None):
    model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32)
    if vocab_size is not None:
        torch.manual_seed(SEED)
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return model.eval()


def randomise_added_rows(model, old_vocab_size: int, generator) -> None:
    """Rows of their own for the added tokens, of the embedding and of a head that is not tied to it, large enough to be emitted."""
    with torch.no_grad():
        for weight in {id(w): w for w in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}.values():
            weight[old_vocab_size:] = 0.6 * torch.randn(weight[old_vocab_size:].shape, generator=generator)


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
            elif "trainable_tokens" in name:
                parameter.copy_(0.6 * noise)
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


def shard(weights: pathlib.Path) -> None:
    """Splits a file in three with an index, as a model's are. PEFT writes none and reads none: its numbers are those of the whole file."""
    tensors = sorted(load_file(weights).items())
    weight_map = {}
    for number in range(3):
        file = f"{weights.stem}-{number + 1:05}-of-00003.safetensors"
        save_file(dict(tensors[number::3]), weights.with_name(file), metadata={"format": "pt"})
        weight_map |= {key: file for key, _ in tensors[number::3]}
    size = sum(tensor.nbytes for _, tensor in tensors)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    weights.with_name(weights.name + ".index.json").write_text(json.dumps(index, indent=1) + "\n")
    weights.unlink()


def make(name: str, base_name: str, config: dict, dtype, vocab_size: int | None = None) -> dict:
    folder = HERE / "adapters" / name
    old_vocab_size = load_base(base_name).config.vocab_size
    added = list(range(old_vocab_size, vocab_size or 0))
    prompt = PROMPT[:3] + added[:1] + PROMPT[3:6] + added[-1:] + PROMPT[6:]
    for seed in range(SEED, SEED + 200):
        generator = torch.Generator().manual_seed(seed)
        base = load_base(base_name, vocab_size)
        randomise_added_rows(base, old_vocab_size, generator)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(config)))
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
        # Resized with other random rows: what the adapter does not bring would show.
        reloaded = PeftModel.from_pretrained(load_base(base_name, vocab_size), folder).eval()
        try:
            answer = greedy(reloaded, prompt)
        except AssertionError:
            continue
        if added and not set(added) & set(answer["output_ids"]):
            continue
        if name.endswith("sharded"):
            shard(weights)
        own = {} if vocab_size is None else {"prompt_ids": prompt, "vocab_size": vocab_size}
        return {"name": name, "base": base_name, "seed": seed, **own, **answer}
    raise SystemExit(f"{name}: no seed gives clear choices")


def combine(base_name: str, weights: dict) -> dict:
    first, *others = weights
    model = PeftModel.from_pretrained(load_base(base_name), HERE / "adapters" / first, adapter_name=first)
    for name in others:
        model.load_adapter(HERE / "adapters" / name, adapter_name=name)
    model.add_weighted_adapter(list(weights), list(weights.values()), "combined", combination_type="cat")
    model.set_adapter("combined")
    return {"base": base_name, "weights": weights, **greedy(model.eval(), PROMPT)}


def write(file: str, made_by: str, about: str, cases: dict, combinations: list, wanted: list[str]) -> None:
    """Makes `cases` (by name: the arguments of `make`) and `combinations`, and writes what they compute. `wanted` alone, if there are some."""
    old = json.loads((HERE / file).read_text()) if wanted else {"cases": []}
    kept = {case["name"]: case for case in old["cases"] if case["name"] not in wanted}
    made = [kept.get(name) or make(name, *case) for name, case in cases.items()]
    sums = old.get("combinations") or [combine(*combination) for combination in combinations]
    bases = old.get("bases") or {name: greedy(load_base(name), PROMPT) for name in sorted({case["base"] for case in made})}
    for case in made:
        base = bases[case["base"]]
        moved = max(abs(a[0][1] - b[0][1]) for a, b in zip(case["top_logprobs"], base["top_logprobs"]))
        assert moved > 0.05, f"{case['name']} changes nothing"
    head = {
        "made_by": made_by,
        "versions": {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "about": about,
        "prompt_ids": PROMPT,
        "bases": bases,
    }
    lines = ",\n".join(json.dumps(case) for case in made)
    sums = ",\n".join(json.dumps(case) for case in sums)
    (HERE / file).write_text(f'{json.dumps(head)[:-1]}, "cases": [\n{lines}\n], "combinations": [\n{sums}\n]}}\n')
    print(f"{len(made)} adapters")


def main() -> None:
    cases = dict(CASES)
    for name, (base_name, vocab_size, config) in TOKEN_CASES.items():
        cases[name] = (base_name, config, None, vocab_size)
    about = (
        "f32. top_logprobs: the five best [token id, log-probability] of the next token after each prompt token and each output token but the last. "
        "prompt_ids and vocab_size of a case, if it has tokens of its own."
    )
    write("adapters.json", "engine/tests/golden/make_adapters.py", about, cases, COMBINATIONS, sys.argv[1:])


if __name__ == "__main__":
    main()
