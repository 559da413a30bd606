"""One odd key of adapter_config.json at a time, over the same weights: what PEFT computes with it.

    python engine/tests/golden/make_corpus.py      # writes adapters/corpus/ and corpus.json beside this file

Each configuration is that of a plain adapter with one key set to something else. `PeftModel.from_pretrained` reads it on a fresh base; the case
has the numbers of that model in f32, or PEFT's error. Keys that come with tensors of their own name a case of adapters.json instead.
"""

import json
import shutil
import tempfile

import peft
import torch
import transformers
from make_adapters import HERE, PROMPT, SEED, greedy, load_base, randomise
from peft import LoraConfig, PeftModel, get_peft_model

BASE = "tiny-llama3"
# Key, value. Several of a key where its values differ in kind.
ODD = [
    ("alora_invocation_tokens", [1, 2]),
    ("alpha_pattern", {"q_proj": 2}),
    ("arrow_config", {"top_k": 2}),
    ("auto_mapping", {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}),
    ("base_model_name_or_path", "org/model"),
    ("bias", "some"),
    ("corda_config", {"corda_method": "ipm"}),
    ("ensure_weight_tying", True),
    ("eva_config", {"rho": 2.0}),
    ("exclude_modules", ["c_attn"]),
    ("fan_in_fan_out", True),
    ("inference_mode", False),
    ("init_lora_weights", False),
    ("init_lora_weights", "gaussian"),
    ("init_lora_weights", "orthogonal"),
    ("init_lora_weights", "eva"),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "of next year"),
    ("kasa_config", {"beta": 1e-4}),
    ("layer_replication", [[0, 2], [0, 2]]),
    ("layers_pattern", "layers"),
    ("layers_to_transform", [0, 1]),
    ("loftq_config", {"loftq_bits": 4}),
    ("lora_alpha", 5),
    ("lora_alpha", 0.25),
    ("lora_alpha", -3),
    ("lora_dropout", 0.1),
    ("lora_ga_config", {"direction": "ArB2r"}),
    ("megatron_config", {"x": 1}),
    ("megatron_core", "my.megatron"),
    ("modules_to_save", ["classifier"]),
    ("modules_to_save", ["norm"]),
    ("monteclora_config", {"num_samples": 8}),
    ("new_name_of_next_year", "x"),
    ("peft_type", "IA3"),
    ("peft_version", "0.9.0"),
    ("qalora_group_size", 32),
    ("rank_pattern", {"k_proj": 2}),
    ("revision", "main"),
    ("runtime_config", {"ephemeral_gpu_offload": True}),
    ("target_modules", ["q_proj", "v_proj", "c_attn"]),
    ("target_modules", r".*\.(q|v)_proj"),
    ("target_parameters", ["experts.gate_up_proj"]),
    ("task_type", "SEQ_CLS"),
    ("use_bdlora", {"nblocks": 2}),
    ("use_new_lora_of_next_year", True),
    ("use_qalora", True),
    ("use_rslora", True),
    ("velora_config", {"num_groups": 64}),
]
# Key -> the case of adapters.json where it has another value than PEFT's default, and the tensors that go with it.
WITH_TENSORS = {
    "bias": "bias_all",
    "exclude_modules": "excluded",
    "layers_pattern": "one_layer",
    "layers_to_transform": "one_layer",
    "lora_bias": "lora_bias",
    "modules_to_save": "saved_head",
    "r": "one_layer",
    "rank_pattern": "rslora_patterns",
    "target_modules": "regex_lookahead",
    "trainable_token_indices": "rows_both",
    "use_dora": "dora",
}


def ask(folder) -> dict:
    """What PEFT computes with an adapter, or why it does not."""
    try:
        model = PeftModel.from_pretrained(load_base(BASE), folder)
    except Exception as error:  # noqa: BLE001: whatever it raises, it has refused the key
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"}
    return greedy(model.eval(), PROMPT)


def main() -> None:
    generator = torch.Generator().manual_seed(SEED)
    model = get_peft_model(load_base(BASE), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    randomise(model, generator)
    folder = HERE / "adapters" / "corpus"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE}
    config["target_modules"].sort()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    cases = [{"key": "r", "value": 4, "plain": True, **ask(folder)}]
    for key, value in ODD:
        with tempfile.TemporaryDirectory() as odd:
            shutil.copy(folder / "adapter_model.safetensors", odd)
            with open(f"{odd}/adapter_config.json", "w") as file:
                json.dump(config | {key: value}, file)
            cases.append({"key": key, "value": value, **ask(odd)})
            print(key, json.dumps(value), cases[-1].get("error", "computed"))
    keys = sorted(LoraConfig().to_dict())
    missing = set(keys) - {key for key, _ in ODD} - set(WITH_TENSORS)
    assert not missing, f"no odd value for {missing}"
    head = {
        "made_by": "engine/tests/golden/make_corpus.py",
        "versions": {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "about": "f32; numbers as in adapters.json. Each case: the configuration of adapters/corpus with one key set to this value.",
        "base": BASE,
        "prompt_ids": PROMPT,
        "peft_keys": keys,
        "with_tensors": WITH_TENSORS,
    }
    lines = ",\n".join(json.dumps(case) for case in cases)
    (HERE / "corpus.json").write_text(f'{json.dumps(head)[:-1]}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
