#!/usr/bin/env python3
"""What thousands of adapters cost over HTTP, in the shape of a real model: cold starts, what others feel of them, churn, and the cliff.

    python benches/adapter_traffic.py model /tmp/m                            # Llama-3.1-8B's config.json, and a tokenizer of made-up words
    python benches/adapter_traffic.py adapters /tmp/host a 200                # random rank-16 adapters a0 ... a199, each with bytes of its own
    python benches/adapter_traffic.py adapters /tmp/disk d 100
    polylora serve --device cuda --model-path /tmp/m --load-format dummy --served-model-name base --max-loras-per-batch 64 \\
        --max-running-requests 256 --max-queued-requests 4096 --lora-dir /tmp/disk \\
        --lora-paths $(for i in $(seq 0 199); do echo a$i=/tmp/host/a$i; done)

    python benches/adapter_traffic.py cold a 200 --rate 100                   # first requests of a0 ... a199 beside four streams, then again
    python benches/adapter_traffic.py cold d 100 --rate 50                    # the same from disk
    python benches/adapter_traffic.py load a 200 --zipf --concurrency 64 --requests 512     # churn: 256 tokens in, 128 out
    python benches/adapter_traffic.py load a 8 16 64 200 --rate 12 --seconds 8 --warm       # the cliff (served with --max-loras-per-batch 8)

`cold` and `load` speak to any server of the OpenAI API at --url. Needs numpy for `adapters`, else nothing but Python. Times are in milliseconds.
"""
import argparse
import asyncio
import bisect
import itertools
import json
import multiprocessing
import pathlib
import random
import struct
import time
import urllib.parse
import zlib

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}
# For a try on a CPU.
TINY = LLAMA_8B | {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 64, "bos_token_id": 4094, "eos_token_id": 4095, "rope_scaling": None}


def write_model(folder, config):
    """A model's size and words: `--load-format dummy` makes up its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {f"w{token_id}": token_id for token_id in range(config["vocab_size"])}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
                 "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}}
    for name, content in (("config.json", config), ("tokenizer.json", tokenizer)):
        (folder / name).write_text(json.dumps(content))


def write_adapter(folder, config, rank, seed):
    """Random values of both signs between 2^-9 and 2^-6 in A and 2^-13 and 2^-10 in B, in bf16."""
    import numpy

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    modules = {"self_attn.q_proj": (hidden, q), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv), "self_attn.o_proj": (q, hidden),
               "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    folder.mkdir(parents=True, exist_ok=True)
    names = [module.split(".")[1] for module in modules]
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}))
    header, blobs, offset, generator = {}, [], 0, numpy.random.default_rng(seed)
    for layer, (module, (d_in, d_out)) in itertools.product(range(config["num_hidden_layers"]), modules.items()):
        for side, shape, exponent in (("A", (rank, d_in), 118), ("B", (d_out, rank), 114)):
            bits = generator.integers(0, 1 << 16, shape, dtype=numpy.uint16)
            # Sign and mantissa as they come; of the exponent two bits.
            values = (bits & 0x807F) | (((bits >> 7 & 3) + exponent) << 7).astype(numpy.uint16)
            header[f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"] = {
                "dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + values.nbytes]}
            offset += values.nbytes
            blobs.append(values)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for blob in blobs:
            file.write(blob.tobytes())


class Client:
    def __init__(self, url, vocab_size):
        address = urllib.parse.urlparse(url)
        self.host, self.port, self.vocab_size = address.hostname, address.port or 80, vocab_size

    async def stream(self, model, prompt_tokens, output_tokens, rng):
        """Seconds from the request to each of its tokens."""
        prompt = [rng.randrange(self.vocab_size - 8) for _ in range(prompt_tokens)]
        body = {"model": model, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps(body).encode()
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status, times, came = await reader.readline(), [], None
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                came = time.perf_counter() - began
                # Servers differ in whether the last token comes with the reason of the end, or before it; and a token may have no text.
                if any(choice["text"] or not choice["finish_reason"] for choice in json.loads(line[6:]).get("choices", [])):
                    times.append(came)
            elif not status.split()[1] == b"200" and line.startswith(b"{"):
                raise RuntimeError(f"{model}: {line.decode()}")
        writer.close()
        # One token, without text, together with the reason.
        times = times or [came] * (came is not None)
        if not times:
            raise RuntimeError(f"{model}: {status.decode().strip()}, no token")
        return times


def quantiles(seconds):
    values = sorted(seconds)
    at = lambda share: 1e3 * values[min(len(values) - 1, int(share * len(values)))]
    return f"p50 {at(0.5):.2f} p99 {at(0.99):.2f} max {at(1):.2f}"


def gaps_of(times):
    return [after - before for before, after in zip(times, times[1:])]


def watch(client, base, stop, gaps, seed):
    """One who streams from the base model all the while."""
    rng, seen = random.Random(seed), []
    while not stop.is_set():
        seen += gaps_of(asyncio.run(client.stream(base, 32, 100, rng)))
    gaps.put(seen)


def cold(arguments, client):
    names = [f"{arguments.prefix}{number}" for number in range(arguments.first, arguments.first + arguments.counts[0])]

    async def arrive():
        async def ask(name, due, seed):
            await asyncio.sleep(due)
            return (await client.stream(name, 32, 1, random.Random(seed)))[0]

        asked = [ask(name, number / arguments.rate, number) for number, name in enumerate(names)]
        return await asyncio.gather(*asked)

    for what in ("nobody else", "cold", "resident", "resident again"):
        stop, gaps = multiprocessing.Event(), multiprocessing.Queue()
        watchers = [multiprocessing.Process(target=watch, args=(client, arguments.base, stop, gaps, seed)) for seed in range(arguments.watchers)]
        for watcher in watchers:
            watcher.start()
        time.sleep(0.5)
        first_tokens = []
        if what == "nobody else":
            time.sleep(len(names) / arguments.rate)
        else:
            first_tokens = asyncio.run(arrive())
        stop.set()
        seen = sum((gaps.get() for _ in watchers), [])
        for watcher in watchers:
            watcher.join()
        asked = f"; first token of {len(names)} at {arguments.rate:g}/s: {quantiles(first_tokens)}" if first_tokens else ""
        print(f"{what}: between tokens of {arguments.watchers} others: {quantiles(seen)}{asked}", flush=True)


async def load_one(arguments, client, count):
    names = [f"{arguments.prefix}{number}" for number in range(arguments.first, arguments.first + count)]
    rng = random.Random(arguments.seed)
    weights = list(itertools.accumulate(1 / (place + 1) if arguments.zipf else 1 for place in range(count)))
    draw = lambda: names[min(count - 1, bisect.bisect(weights, rng.random() * weights[-1]))]
    ask = lambda name, output_tokens: client.stream(name, arguments.prompt_tokens, output_tokens, rng)
    if arguments.warm:
        for name in names:
            await ask(name, 1)
    began, answers = time.perf_counter(), []
    if arguments.rate:
        async def arrive(due, name):
            await asyncio.sleep(due)
            answers.append(await ask(name, arguments.output_tokens))

        due, arrivals = 0.0, []
        while (due := due + rng.expovariate(arguments.rate)) < arguments.seconds:
            arrivals.append(arrive(due, draw()))
        await asyncio.gather(*arrivals)
    else:
        left = iter([draw() for _ in range(arguments.requests)])

        async def one_after_the_other():
            for name in left:
                answers.append(await ask(name, arguments.output_tokens))

        await asyncio.gather(*(one_after_the_other() for _ in range(arguments.concurrency)))
    seconds, tokens = time.perf_counter() - began, sum(map(len, answers))
    first, between = [times[0] for times in answers], sum(map(gaps_of, answers), [])
    print(f"{count} adapters: {len(answers)} requests, {tokens / seconds:.0f} tokens/s; first token {quantiles(first)}; "
          f"between tokens {quantiles(between)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--base", default="base", help="what the server calls the base model")
    parser.add_argument("--tiny", action="store_true", help="a shape for a try on a CPU")
    parser.add_argument("--seed", type=int, default=1)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("model").add_argument("folder", type=pathlib.Path)
    adapters = commands.add_parser("adapters")
    adapters.add_argument("folder", type=pathlib.Path)
    adapters.add_argument("--rank", type=int, default=16)
    cold_parser, load_parser = commands.add_parser("cold"), commands.add_parser("load")
    for command in (adapters, cold_parser, load_parser):
        command.add_argument("prefix")
        command.add_argument("counts", type=int, nargs="+" if command is load_parser else 1)
        command.add_argument("--first", type=int, default=0)
    cold_parser.add_argument("--rate", type=float, default=100, help="first requests a second")
    cold_parser.add_argument("--watchers", type=int, default=4)
    load_parser.add_argument("--zipf", action="store_true", help="by Zipf's law with exponent 1; else evenly")
    load_parser.add_argument("--rate", type=float, help="requests a second at random (Poisson); else --concurrency of them at a time")
    load_parser.add_argument("--seconds", type=float, default=8)
    load_parser.add_argument("--concurrency", type=int, default=64)
    load_parser.add_argument("--requests", type=int, default=512)
    load_parser.add_argument("--prompt-tokens", type=int, default=256)
    load_parser.add_argument("--output-tokens", type=int, default=128)
    load_parser.add_argument("--warm", action="store_true", help="each adapter is asked once before")
    arguments = parser.parse_args()
    config = TINY if arguments.tiny else LLAMA_8B
    client = Client(arguments.url, config["vocab_size"])
    if arguments.command == "model":
        write_model(arguments.folder, config)
    elif arguments.command == "adapters":
        names = [f"{arguments.prefix}{number}" for number in range(arguments.first, arguments.first + arguments.counts[0])]
        work = [(arguments.folder / name, config, arguments.rank, zlib.crc32(name.encode())) for name in names]
        with multiprocessing.Pool() as pool:
            pool.starmap(write_adapter, work)
    elif arguments.command == "cold":
        cold(arguments, client)
    else:
        for count in arguments.counts:
            asyncio.run(load_one(arguments, client, count))


if __name__ == "__main__":
    main()
