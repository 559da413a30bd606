"""Asks PEFT which modules a configuration changes, at which rank and scaling, for configurations that are easy to get wrong.

    python engine/tests/golden/peft_resolution.py      # writes peft_resolution.json beside this file

The answers are PEFT's own (versions are in the file): each configuration is put on a small random model through
`get_peft_model`, and every LoRA layer is asked for its rank, alpha and scaling. Where PEFT raises, the answer is an error.
"""

import json
import pathlib
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

warnings.filterwarnings("ignore")

SHAPE = dict(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=3,
    max_position_embeddings=64,
)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name -> (tied embeddings, what LoraConfig is given)
CASES = {
    "q_v": (False, dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])),
    "all_seven_rslora": (False, dict(r=9, lora_alpha=7, use_rslora=True, target_modules=ALL)),
    "defaults_of_r_and_alpha": (False, dict(target_modules=["down_proj"])),
    "no_target_modules": (False, dict(r=2)),
    "all_linear": (False, dict(r=2, lora_alpha=3, target_modules="all-linear")),
    "all_linear_in_capitals": (False, dict(r=2, lora_alpha=3, target_modules="All-Linear")),
    "all_linear_but_mlp": (False, dict(target_modules="all-linear", exclude_modules=["gate_proj", "up_proj", "down_proj"])),
    "exclude_by_regex": (False, dict(target_modules=ALL, exclude_modules=r".*layers\.[02]\..*")),
    "exclude_by_suffix": (False, dict(target_modules=["q_proj", "o_proj"], exclude_modules=["1.self_attn.q_proj"])),
    "exclude_is_no_part_of_a_word": (False, dict(target_modules=["q_proj", "o_proj"], exclude_modules=["proj"])),
    "exclude_everything": (False, dict(target_modules=["q_proj"], exclude_modules=["q_proj"])),
    "regex": (False, dict(target_modules=r".*\.(q|v)_proj")),
    "regex_must_match_all": (False, dict(target_modules=r"model\.layers\.1\.self_attn\.q_pro")),
    "regex_alternatives": (False, dict(target_modules=r"model\.layers\.1\.self_attn\.q_proj|.*down_proj")),
    "regex_lookahead": (False, dict(target_modules=r"^(?!.*layers\.1\.).*\.(?:k_proj|gate_proj)$")),
    "regex_lookbehind": (False, dict(target_modules=r".*(?<=mlp\.)up_proj")),
    "regex_word_boundary": (False, dict(target_modules=r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|up_proj)))")),
    "regex_python_group": (False, dict(target_modules=r"model\.layers\.(?P<layer>[01])\.mlp\.(?P<name>gate|up)_proj")),
    "regex_matches_a_container": (False, dict(target_modules=r"model\.layers\.0\.(mlp|self_attn\.q_proj)")),
    "name_of_a_container": (False, dict(target_modules=["mlp"])),
    "name_of_a_norm": (False, dict(target_modules=["q_proj", "input_layernorm"])),
    "suffix_with_dots": (False, dict(target_modules=["1.self_attn.q_proj", "mlp.up_proj"])),
    "whole_path": (False, dict(target_modules=["model.layers.2.self_attn.k_proj"])),
    "suffix_is_not_a_part": (False, dict(target_modules=["proj"])),
    "one_name_unknown": (False, dict(target_modules=["q_proj", "c_attn"])),
    "embedding_and_head": (False, dict(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "embedding_and_head_tied": (True, dict(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "layers_list": (False, dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2])),
    "layers_int": (False, dict(target_modules=["q_proj"], layers_to_transform=1)),
    "layers_empty": (False, dict(target_modules=["q_proj"], layers_to_transform=[])),
    "layers_beyond": (False, dict(target_modules=["q_proj"], layers_to_transform=[1, 7])),
    "layers_all_beyond": (False, dict(target_modules=["q_proj"], layers_to_transform=[7])),
    "layers_and_embedding": (False, dict(target_modules=["q_proj", "embed_tokens"], layers_to_transform=[1])),
    "layers_and_head": (False, dict(target_modules=["q_proj", "lm_head"], layers_to_transform=[1])),
    "layers_and_whole_path": (False, dict(target_modules=["model.layers.0.mlp.up_proj", "q_proj"], layers_to_transform=[2])),
    "layers_pattern": (False, dict(target_modules=["v_proj"], layers_to_transform=[0], layers_pattern="layers")),
    "layers_pattern_list": (False, dict(target_modules=["v_proj"], layers_to_transform=[0, 1], layers_pattern=["h", "layers"])),
    "layers_pattern_other": (False, dict(target_modules=["v_proj"], layers_to_transform=[0], layers_pattern="h")),
    "layers_pattern_empty": (False, dict(target_modules=["v_proj"], layers_to_transform=[0], layers_pattern="")),
    "layers_pattern_alone": (False, dict(target_modules=["v_proj"], layers_pattern="layers")),
    "layers_with_regex": (False, dict(target_modules=".*v_proj", layers_to_transform=[0])),
    "layers_without_targets": (False, dict(layers_to_transform=[0])),
    "rank_pattern": (False, dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})),
    "rank_pattern_full_path": (
        False,
        dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"model.layers.1.self_attn.q_proj": 16}),
    ),
    "rank_pattern_regex": (False, dict(r=4, target_modules=ALL, rank_pattern={r"layers\.[12]\.mlp\..*": 1, "^model.layers.0.*": 5})),
    "rank_pattern_first_wins": (
        False,
        dict(r=4, target_modules=["q_proj"], rank_pattern={"self_attn.q_proj": 2, "q_proj": 6, "1.self_attn.q_proj": 9}),
    ),
    "rank_pattern_is_no_part": (False, dict(r=4, target_modules=["q_proj"], rank_pattern={"proj": 2, "q_pro": 3, "layers.1": 5})),
    "rank_pattern_alternatives": (False, dict(r=4, target_modules=ALL, rank_pattern={"q_proj|down_proj": 3})),
    "alpha_pattern": (False, dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 3})),
    "alpha_pattern_without_rank": (
        False,
        dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 1.5}),
    ),
    "both_patterns_rslora": (
        False,
        dict(
            r=4,
            lora_alpha=8,
            use_rslora=True,
            target_modules=ALL,
            rank_pattern={"o_proj": 2, r"layers\.2\..*": 7},
            alpha_pattern={"o_proj": 32, r".*\.mlp\.down_proj": 1},
        ),
    ),
    "pattern_on_embedding": (
        False,
        dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head"], rank_pattern={"embed_tokens": 2}, alpha_pattern={"lm_head": 1}),
    ),
    "fan_in_fan_out": (False, dict(target_modules=["q_proj"], fan_in_fan_out=True)),
    "modules_to_save_head": (False, dict(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])),
    "modules_to_save_both": (False, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "modules_to_save_nothing": (False, dict(target_modules=["q_proj"], modules_to_save=["classifier"])),
    "modules_to_save_tied": (True, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "tying_targets": (True, dict(r=3, lora_alpha=6, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)),
    "tying_targets_by_head": (True, dict(r=3, lora_alpha=6, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)),
    "tying_targets_by_regex": (
        True,
        dict(r=3, lora_alpha=6, target_modules=r".*q_proj|.*embed_tokens|embed_tokens", ensure_weight_tying=True),
    ),
    "tying_targets_pattern": (
        True,
        dict(
            r=3,
            lora_alpha=6,
            target_modules=["embed_tokens", "lm_head"],
            ensure_weight_tying=True,
            rank_pattern={"lm_head": 2},
            alpha_pattern={"lm_head": 10},
        ),
    ),
    "tying_untied_base": (False, dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)),
    "tying_nothing": (True, dict(target_modules=["q_proj"], ensure_weight_tying=True)),
    "many_whole_paths": (
        False,
        dict(target_modules=[f"model.layers.{i}.{p}.{m}" for i in range(3) for p, m in (
            ("self_attn", "q_proj"), ("self_attn", "k_proj"), ("self_attn", "v_proj"), ("self_attn", "o_proj"),
            ("mlp", "gate_proj"), ("mlp", "up_proj"), ("mlp", "down_proj"))][:20]),
    ),
}


def answer(tied: bool, config: dict) -> dict:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    try:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    except Exception as error:  # noqa: BLE001 - whatever PEFT raises is its answer
        return {"error": type(error).__name__}
    modules, saved = {}, []
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            a = module.lora_A["default"].weight if "default" in module.lora_A else module.lora_embedding_A["default"]
            modules[name] = {
                "lora_rank": a.shape[0],
                "lora_alpha": module.lora_alpha["default"],
                "scaling": module.scaling["default"],
            }
        if type(module).__name__ == "ModulesToSaveWrapper":
            saved.append(name)
    return {"modules": modules, "saved": sorted(saved)}


def main() -> None:
    cases = []
    for name, (tied, config) in CASES.items():
        cases.append({"name": name, "tied": tied, "config": config, "peft": answer(tied, json.loads(json.dumps(config)))})
    default = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    head = {
        "made_by": "engine/tests/golden/peft_resolution.py",
        "versions": {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "shape": SHAPE,
        # Every key that this PEFT writes, with its default.
        "default_config": {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(default.items())},
    }
    lines = [json.dumps(case) for case in cases]
    text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "cases": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text(text)
    print(f"{path}: {len(cases)} cases, {sum('error' in case['peft'] for case in cases)} refused by PEFT")


if __name__ == "__main__":
    main()
