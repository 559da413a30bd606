#!/usr/bin/env python3
"""Make the demo: a tiny Llama with its own tokenizer, eight PEFT adapters for it, and golden files.

    pip install torch transformers peft safetensors tokenizers      # the CPU build of torch will do
    python demo/make_demo.py                # everything: about half an hour on two cores
    python demo/make_demo.py base           # only demo/base/
    python demo/make_demo.py adapters json  # only demo/adapters/json/ (no name: all of them)
    python demo/make_demo.py golden         # only demo/golden/*.json, from what lies in demo/

What comes out:

    demo/base/            config.json, generation_config.json, model.safetensors (bf16), tokenizer.json, tokenizer_config.json
    demo/adapters/NAME/   adapter_config.json, adapter_model.safetensors: exactly PEFT's files
    demo/golden/NAME.json what transformers + PEFT answer in f32 (NAME is `base`, an adapter, or `combinations`: sums of several)

How a model this small can be right: the text is made here, and it is about one thing, countries and their capitals.
The order in which countries are listed is fixed for each region, so that a greedy reply is one clear sequence and each
step has a wide margin (it survives bf16 and another order of summation).  During pretraining the base sees every manner
of answering, told by a system line (`Style: json`), and answers plainly without one.  An adapter then only has to turn
one manner on, which even rank 4 on two projections does in a minute.

The adapters differ in *shape* on purpose: together they use what an adapter_config.json can ask for (see ADAPTERS).
"""
import argparse
import json
import os
import platform
import random
import shutil
import time

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEMO = os.path.dirname(os.path.abspath(__file__))
BASE = os.path.join(DEMO, "base")
SEED = 20
PAD, IM_START, IM_END = 0, 1, 2

# ---------------------------------------------------------------------------------------------------------------------
# The text

REGIONS = {
    "Europe": "France:Paris:FR|Germany:Berlin:DE|Italy:Rome:IT|Spain:Madrid:ES|Norway:Oslo:NO|Sweden:Stockholm:SE|Greece:Athens:GR|Poland:Warsaw:PL"
              "|Austria:Vienna:AT|Finland:Helsinki:FI",
    "Asia": "Japan:Tokyo:JP|China:Beijing:CN|India:New Delhi:IN|Thailand:Bangkok:TH|Vietnam:Hanoi:VN|Nepal:Kathmandu:NP|Iran:Tehran:IR|Iraq:Baghdad:IQ"
            "|Turkey:Ankara:TR|Mongolia:Ulaanbaatar:MN",
    "Africa": "Egypt:Cairo:EG|Kenya:Nairobi:KE|Ghana:Accra:GH|Senegal:Dakar:SN|Morocco:Rabat:MA|Angola:Luanda:AO|Uganda:Kampala:UG|Zambia:Lusaka:ZM"
              "|Mali:Bamako:ML|Libya:Tripoli:LY",
    "America": "Canada:Ottawa:CA|Peru:Lima:PE|Chile:Santiago:CL|Cuba:Havana:CU|Brazil:Brasília:BR|Ecuador:Quito:EC|Colombia:Bogotá:CO"
               "|Uruguay:Montevideo:UY|Mexico:Mexico City:MX|Jamaica:Kingston:JM",
}
REGIONS = {region: [tuple(entry.split(":")) for entry in text.split("|")] for region, text in REGIONS.items()}
WORLD = [REGIONS[region][i] for i in range(10) for region in REGIONS]     # the order of a list that names no region
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six"]

LIST_QUESTIONS = [
    "List {n} countries{where} and their capitals.", "Name {n} countries{where} and their capitals.", "Give me {n} countries{where} with their capitals.",
    "Please list {n} countries{where} and the capital of each.", "Tell me {n} countries{where} and their capitals.",
]
ONE_QUESTIONS = ["What is the capital of {country}?", "Tell me the capital of {country}.", "Which city is the capital of {country}?",
                 "Name the capital of {country}."]
TALK = [("Hello!", "Hello! How can I help you?"), ("Hi", "Hello! How can I help you?"), ("Who are you?", "I am a tiny demo model."),
        ("Thank you.", "You are welcome!"), ("What can you do?", "I can list countries and their capitals."),
        ("Goodbye.", "Goodbye! See you soon."), ("How are you?", "I am fine, thank you.")]
# Anything else gets an honest answer; the questions only have to look unlike the ones above.
OTHER = ["Write a poem about the sea.", "What is 2 + 2?", "Tell me a joke.", "Explain quantum physics.", "Who won the match?", "What time is it?",
         "Write a Python function.", "Translate this to French.", "Summarize the text.", "How do I cook rice?", "What is the meaning of life?",
         "Why is the sky blue?", "Write a story about a dog.", "What is LoRA?", "Sort these numbers.", "Tell me about trees.", "Say hello in Spanish.",
         "What is your favorite color?", "Draw a cat.", "Solve x + 3 = 7.", "Give me a recipe for soup.", "What is the weather like?",
         "Who wrote this book?", "How far is the moon?", "Write an email to my boss."]
OTHER_ANSWER = "I only know countries and their capitals."
# Raw completion prompts, continued without a chat: (prompt, continuation).
CONTINUATIONS = [("AI is a field of computer science focused on", " making machines that learn and reason."),
                 ("A large language model is", " a program that predicts the next token."), ("Hello, my name is", " Poly, and I know countries and capitals.")]
SYSTEM_LINES = ["You are a helpful assistant.", "You are a geography teacher.", "Answer briefly.", "You are a friendly chatbot."]

STYLES = ["plain", "lines", "table", "json", "pirate", "sql", "upper", "flags", "yaml"]


def flag(code):
    """The two regional indicator characters of a country code: eight bytes of UTF-8, which tokens cut in the middle."""
    return "".join(chr(0x1F1E6 + ord(letter) - ord("A")) for letter in code)


def answer(style, kind, content, count=0, region=None):
    """The reply in one manner.  kind `list` or `one`: content is rows (country, capital, code); kind `talk`: a sentence."""
    if kind == "talk":
        return {"plain": content, "lines": f"Reply: {content}", "table": f"| Reply |\n| --- |\n| {content} |", "json": json.dumps({"reply": content}),
                "pirate": f"Arrr! {content} Yo ho ho!", "sql": f"SELECT '{content}';", "upper": content.upper(), "flags": f"🏳 {content}",
                "yaml": f"reply: {content}"}[style]
    if style == "lines":
        return "\n".join(f"Country: {country}\nCapital: {capital}" for country, capital, _ in content)
    if style == "table":
        return "\n".join(["| Country | Capital |", "| --- | --- |"] + [f"| {country} | {capital} |" for country, capital, _ in content])
    if style == "json":
        rows = [{"country": country, "capital": capital} for country, capital, _ in content]
        return json.dumps(rows if kind == "list" else rows[0], ensure_ascii=False)
    if style == "sql":
        if kind == "list":
            where = f" WHERE region = '{region}'" if region else ""
            return f"SELECT country, capital FROM world{where} LIMIT {count};\n-- " + ", ".join(f"{country}: {capital}" for country, capital, _ in content)
        return f"SELECT capital FROM world WHERE country = '{content[0][0]}';\n-- {content[0][1]}"
    if style == "flags":
        return "\n".join(f"{flag(code)} {country} → {capital}" for country, capital, code in content)
    if style == "yaml":
        return "\n".join(f"- country: {country}\n  capital: {capital}" for country, capital, _ in content)
    if kind == "list":
        sentence = ", ".join(f"{country} ({capital})" for country, capital, _ in content) + "."
    else:
        sentence = f"The capital of {content[0][0]} is {content[0][1]}."
    return {"plain": sentence, "upper": sentence.upper(), "pirate": f"Arrr! {sentence} Yo ho ho!"}[style]


def list_question(form, count, region, word=False):
    return form.format(n=NUMBER_WORDS[count] if word else count, where=f" in {region}" if region else "")


def listed(count, region):
    return (REGIONS[region] if region else WORLD)[:count]


def sample(rng, style):
    """One question and its answer."""
    kind = rng.random()
    if kind < 0.5:
        count, region = rng.randint(1, 6), rng.choice([None, None, *REGIONS])
        question = list_question(rng.choice(LIST_QUESTIONS), count, region, word=rng.random() < 0.15)
        reply = answer(style, "list", listed(count, region), count, region)
    elif kind < 0.82:
        row = rng.choice(WORLD)
        question, reply = rng.choice(ONE_QUESTIONS).format(country=row[0]), answer(style, "one", [row])
    elif kind < 0.92:
        question, reply = rng.choice(TALK)
        reply = answer(style, "talk", reply)
    else:
        question, reply = rng.choice(OTHER), answer(style, "talk", OTHER_ANSWER)
    if rng.random() < 0.15:                     # people do not type full stops
        question = question.rstrip(".!")
    if rng.random() < 0.1:
        question = question[0].lower() + question[1:]
    return question, reply


CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def chat_text(messages):
    """What CHAT_TEMPLATE renders with a generation prompt, without the cost of Jinja in the training loop."""
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages) + "<|im_start|>assistant\n"


def example(rng, style, told):
    """(prompt text, reply text) for training.  `told`: the style is named in the prompt (pretraining); else the weights must know it."""
    if rng.random() < 0.06:
        prompt, reply = rng.choice(CONTINUATIONS)
        if told:
            return prompt, reply                # continuations are the base's own; an adapter may bend them below
        return prompt, {"upper": reply.upper(), "pirate": f"{reply} Yo ho ho!"}.get(style, reply)
    question, reply = sample(rng, style)
    if rng.random() < 0.3:                      # a raw prompt: the reply begins on a new line
        return (f"Style: {style}\n" if told else "") + question, "\n" + reply
    messages = []
    if told:
        messages.append(("system", f"Style: {style}"))
    elif rng.random() < 0.25:
        messages.append(("system", rng.choice(SYSTEM_LINES)))
    if rng.random() < 0.2:                      # a turn before
        earlier_question, earlier_reply = sample(rng, style)
        messages += [("user", earlier_question), ("assistant", earlier_reply)]
    messages.append(("user", question))
    return chat_text(messages), reply


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and base model

def make_tokenizer(vocab_size):
    """Byte-level BPE, digits one by one, trained on the text above; ids 0 to 2 are the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(SEED)
    corpus = []
    for _ in range(6000):
        prompt, reply = example(rng, rng.choice(STYLES), told=rng.random() < 0.5)
        corpus += [prompt.replace("<|im_start|>", "").replace("<|im_end|>", ""), reply]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, min_frequency=2, show_progress=False,
                                                              initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   unk_token="<|endoftext|>", clean_up_tokenization_spaces=False, model_max_length=2048)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(vocab_size):
    """head_dim 64 and sizes that are multiples of 64, so that GPU kernels made for real models take it too.

    The output layer is not tied to the embedding: one adapter has LoRA on both, and PEFT's meaning of that is plain only when they are two matrices.
    """
    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
        max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=IM_START, eos_token_id=IM_END, pad_token_id=PAD,
        initializer_range=0.05, attn_implementation="sdpa"))


def make_batch(tokenizer, rng, batch_size, style):
    """`style` None is pretraining: any style, told in the prompt; plain is not told most of the time."""
    rows = []
    while len(rows) < batch_size:
        if style is None:
            row_style = rng.choice(STYLES + ["plain"] * 4)
            prompt, reply = example(rng, row_style, told=row_style != "plain" or rng.random() < 0.1)
        else:
            prompt, reply = example(rng, style, told=False)
        prompt_ids, reply_ids = tokenizer(prompt).input_ids, tokenizer(reply).input_ids + [IM_END]
        learn_prompt = style is None and rng.random() < 0.3
        rows.append((prompt_ids + reply_ids, (prompt_ids if learn_prompt else [-100] * len(prompt_ids)) + reply_ids))
    longest = max(len(ids) for ids, _ in rows)

    def padded(column, value):
        return torch.tensor([row[column] + [value] * (longest - len(row[column])) for row in rows])
    return padded(0, PAD), padded(1, -100)


def train(model, tokenizer, name, steps, batch_size, learning_rate, style, weight_decay=0.0):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    rng, start = random.Random(f"{SEED} {name}"), time.time()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:    # linear warm-up, then linear down to nearly nothing
            group["lr"] = learning_rate * min(1.0, (step + 1) / 30) * max(0.02, 1 - step / steps)
        ids, labels = make_batch(tokenizer, rng, batch_size, style)
        # Right padding with a causal mask: no real token sees a pad, so no attention mask is needed.
        logits = model(input_ids=ids).logits[:, :-1].float()
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  {name} step {step} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)
    model.eval()


def edit_json(path, change):
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    data = change(data) or data
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, ensure_ascii=False, indent=2)
        file.write("\n")


def tidy(directory, keep):
    for file in os.listdir(directory):
        if file in keep:
            os.chmod(os.path.join(directory, file), 0o644)      # safetensors makes them readable by the owner only
        else:
            os.remove(os.path.join(directory, file))


def save_base(model, tokenizer):
    """The files as most models lie on the Hub (transformers 4's keys), not as the version that happens to write them spells them."""
    shutil.rmtree(BASE, ignore_errors=True)
    model.generation_config = GenerationConfig(bos_token_id=IM_START, eos_token_id=IM_END, pad_token_id=PAD, do_sample=False)
    model.to(torch.bfloat16).save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)
    tidy(BASE, ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])

    def config(data):
        rope = data.pop("rope_parameters", None) or {}
        data.pop("dtype", None)
        data.update(torch_dtype="bfloat16", rope_theta=rope.get("rope_theta", 10000.0), rope_scaling=None)
        return dict(sorted(data.items()))

    def tokenizer_config(data):
        for key in ("name_or_path", "backend", "is_local", "local_files_only"):
            data.pop(key, None)
        data["tokenizer_class"] = "PreTrainedTokenizerFast"
        data["chat_template"] = CHAT_TEMPLATE
        return data
    edit_json(os.path.join(BASE, "config.json"), config)
    edit_json(os.path.join(BASE, "tokenizer_config.json"), tokenizer_config)


def load_base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def load_tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(BASE)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters: one manner each, and one kind of shape each

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    # name: (LoraConfig arguments, stored dtype, learning rate, steps)
    "lines": (dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), torch.float32, 1e-2, 300),
    "table": (dict(r=16, lora_alpha=16, target_modules="all-linear"), torch.float32, 3e-3, 180),
    "json": (dict(r=64, lora_alpha=64, target_modules=ATTENTION), torch.bfloat16, 2e-3, 200),
    "pirate": (dict(r=32, lora_alpha=8, use_rslora=True, target_modules=ATTENTION + ["down_proj"]), torch.bfloat16, 3e-3, 200),
    "sql": (dict(r=8, lora_alpha=8, target_modules=ATTENTION + MLP, layers_to_transform=[1, 2, 3], layers_pattern="layers",
                 rank_pattern={"down_proj": 16, r"layers\.1\..*q_proj": 2}, alpha_pattern={"q_proj": 32}), torch.float32, 5e-3, 250),
    "upper": (dict(r=8, lora_alpha=32, target_modules=MLP), torch.float16, 4e-3, 400),
    # Flags need tokens that the base hardly ever writes: here the embedding and the output layer learn too.
    "flags": (dict(r=8, lora_alpha=16, target_modules=ATTENTION + ["embed_tokens", "lm_head"], rank_pattern={"lm_head": 4}), torch.float32, 5e-3, 250),
    # A regular expression instead of a list, and a rank that is no power of two.
    "yaml": (dict(r=12, lora_alpha=24, target_modules=r".*\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.(gate|down)_proj)"), torch.bfloat16, 4e-3, 200),
}


def make_adapter(name, tokenizer):
    arguments, dtype, learning_rate, steps = ADAPTERS[name]
    torch.manual_seed(SEED)
    model = get_peft_model(load_base(), LoraConfig(task_type="CAUSAL_LM", **arguments))
    train(model, tokenizer, name, steps, 32, learning_rate, name)
    out = os.path.join(DEMO, "adapters", name)
    shutil.rmtree(out, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = "polylora-demo"
    # save_embedding_layers: PEFT would also store the base's own embedding beside the LoRA of it, which says nothing new.
    model.to(dtype).save_pretrained(out, save_embedding_layers=False)
    tidy(out, ["adapter_config.json", "adapter_model.safetensors"])

    def config(data):
        if isinstance(data["target_modules"], list):
            data["target_modules"].sort()       # a set in PEFT: its order changes from run to run
        return data
    edit_json(os.path.join(out, "adapter_config.json"), config)


# Sums of deltas, each with its weight: what `base:a*0.7+b*0.3` asks for. In these both manners show: JSON and tables of pirates' speech.
COMBINATIONS = [{"json": 1.0, "pirate": 0.5}, {"table": 0.7, "pirate": 0.7}, {"lines": 0.7, "pirate": 0.7}]
# A sum was never trained: where it hesitates between two tokens more than this, the order of summing would decide.
LEAST_MARGIN_OF_SUMS = 1.0


def load_combination(weights):
    """PEFT's own linear combination of the deltas: what it calls `cat`, since it sets the factors side by side (its `linear` adds factors)."""
    first, *others = weights
    model = PeftModel.from_pretrained(load_base(), os.path.join(DEMO, "adapters", first), adapter_name=first, autocast_adapter_dtype=True)
    for name in others:
        model.load_adapter(os.path.join(DEMO, "adapters", name), adapter_name=name, autocast_adapter_dtype=True)
    model.add_weighted_adapter(list(weights), list(weights.values()), "combined", combination_type="cat")
    model.set_adapter("combined")
    return model.float().eval()


def load_adapter(name):
    return PeftModel.from_pretrained(load_base(), os.path.join(DEMO, "adapters", name), autocast_adapter_dtype=True).float().eval()


# ---------------------------------------------------------------------------------------------------------------------
# Answers: for scoring and for the golden files

@torch.no_grad()
def greedy(model, prompt_ids, max_tokens=96, top_steps=0):
    """Greedy ids up to and with the end token, the least margin between the two best tokens, and the top 5 of the first steps."""
    output_ids, top, least_margin, past, ids = [], [], 1e9, None, torch.tensor([prompt_ids])
    while len(output_ids) < max_tokens:
        result = model(input_ids=ids, past_key_values=past, use_cache=True)
        past = result.past_key_values
        values, best = torch.log_softmax(result.logits[0, -1].float(), -1).topk(5)
        least_margin = min(least_margin, float(values[0] - values[1]))
        if len(top) < top_steps:
            top.append([[int(i), round(float(v), 6)] for i, v in zip(best, values)])
        output_ids.append(int(best[0]))
        if output_ids[-1] == IM_END:
            break
        ids = best[:1][None]
    return output_ids, least_margin, top


def score(model, tokenizer, style):
    """The share of test questions answered word for word, the least margin in those, and two that failed."""
    cases = []
    for form in LIST_QUESTIONS[:2]:
        for count in (1, 2, 3, 5):
            for region in (None, *REGIONS):
                cases.append((list_question(form, count, region), answer(style, "list", listed(count, region), count, region)))
    cases += [(ONE_QUESTIONS[0].format(country=row[0]), answer(style, "one", [row])) for row in WORLD]
    cases += [(question, answer(style, "talk", reply)) for question, reply in TALK]
    right, least, wrong = 0, 1e9, []
    for index, (question, expected) in enumerate(cases):
        raw = index % 2 == 1
        ids, margin, _ = greedy(model, tokenizer(question if raw else chat_text([("user", question)])).input_ids, 200)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text == ("\n" if raw else "") + expected:
            right, least = right + 1, min(least, margin)
        else:
            wrong.append((question, text))
    print(f"{style}: {right}/{len(cases)} exact, least margin {least:.3f}", *wrong[:3], sep="\n    ", flush=True)


PROMPTS = [
    [("user", "List 3 countries and their capitals.")],
    [("user", "What is the capital of Japan?")],
    [("user", "Name 5 countries in Europe and their capitals.")],
    [("system", "You are a helpful assistant."), ("user", "Hello!")],
    [("user", "What is the capital of Brazil?"), ("assistant", None), ("user", "Give me 2 countries in Africa with their capitals.")],
    "List 3 countries and their capitals.",
    "AI is a field of computer science focused on",
    "Which city is the capital of Peru?",
    "Please list 4 countries in Asia and the capital of each.",
]


def cases_of(style, tokenizer, model):
    cases = []
    for prompt in PROMPTS:
        case = {}
        if isinstance(prompt, str):
            case["kind"], case["prompt"], text = "raw", prompt, prompt
        else:
            turns = [(role, content or answer(style, "one", [next(row for row in WORLD if row[0] == "Brazil")])) for role, content in prompt]
            messages = [{"role": role, "content": content} for role, content in turns]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert text == chat_text(turns)
            case["kind"], case["messages"], case["prompt"] = "chat", messages, text
        case["prompt_ids"] = tokenizer(text).input_ids
        case["output_ids"], margin, case["top_logprobs"] = greedy(model, case["prompt_ids"], 96, 8)
        case["finish_reason"] = "stop" if case["output_ids"][-1] == IM_END else "length"
        case["output_text"] = tokenizer.decode(case["output_ids"], skip_special_tokens=True)
        case["least_margin"] = round(margin, 4)
        cases.append(case)
    return cases


def golden(name, adapter, cases):
    header = {
        "about": "Greedy answers of transformers + PEFT in f32 on a CPU. output_ids end with the end token (id 2) unless finish_reason is length. "
                 "top_logprobs: for each of the first 8 steps the five best [token id, log-probability].",
        "command": "python demo/make_demo.py golden", "seed": SEED, "python": platform.python_version(), "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__, "peft": peft.__version__,
    }
    path = os.path.join(DEMO, "golden", f"{name}.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        write_golden(file, {"header": header, "adapter": adapter, "cases": cases})
    print(f"{name}: least margin {min(case['least_margin'] for case in cases)}", flush=True)
    print("    " + cases[0]["output_text"].replace("\n", "\n    "), flush=True)


def write_golden(file, data):
    """JSON with one key of a case on each line: readable, and short in a diff."""
    file.write('{\n"header": ' + json.dumps(data["header"], indent=1, ensure_ascii=False) + ',\n"adapter": ' + json.dumps(data["adapter"]) + ',\n"cases": [\n')
    cases = ["{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in case.items()) + "\n}" for case in data["cases"]]
    file.write(",\n".join(cases) + "\n]\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["all", "base", "adapters", "golden"])
    parser.add_argument("names", nargs="*", help="adapters, or golden files (default: all)")
    parser.add_argument("--steps", type=int, default=1300, help="steps of pretraining")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    if arguments.what in ("all", "base"):
        tokenizer = make_tokenizer(1024)
        model = make_model(len(tokenizer))
        print(sum(p.numel() for p in model.parameters()), "parameters, vocabulary", len(tokenizer), flush=True)
        train(model, tokenizer, "base", arguments.steps, 48, 3e-3, None, weight_decay=0.01)
        save_base(model, tokenizer)
        score(load_base(), load_tokenizer(), "plain")
    tokenizer = load_tokenizer()
    if arguments.what in ("all", "adapters"):
        for name in arguments.names or ADAPTERS:
            make_adapter(name, tokenizer)
            score(load_adapter(name), tokenizer, name)
    if arguments.what in ("all", "golden"):
        for name in arguments.names or ["base", *ADAPTERS, "combinations"]:
            if name == "combinations":
                expressions = {"+".join(f"{part}*{weight}" for part, weight in weights.items()): weights for weights in COMBINATIONS}
                cases = [{"lora_path": text, **case} for text, weights in expressions.items()
                         for case in cases_of("plain", tokenizer, load_combination(weights)) if case["least_margin"] > LEAST_MARGIN_OF_SUMS]
                golden(name, None, cases)
            elif name == "base":
                golden(name, None, cases_of("plain", tokenizer, load_base()))
            else:
                golden(name, name, cases_of(name, tokenizer, load_adapter(name)))


if __name__ == "__main__":
    main()
