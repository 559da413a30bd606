"""PyPI's sglang-router and vllm-router, as they are, in front of three replicas of the demo model, one of which is killed in mid-traffic."""
import concurrent.futures
import itertools
import math
import signal
import sys
import threading
import time
import unittest

import openai

from routers import Router
from server import LIST_3, Server, golden

MODELS = [("demo", None), ("demo:json", "json"), ("table", "table"), ("demo:pirate", "pirate"), ("yaml", "yaml")]
CLIENTS = 4
TRY_AGAIN_SOON = ("--retry-initial-backoff-ms", "20", "--health-check-interval-secs", "1", "--worker-startup-check-interval", "1")


class Replicas:
    """Three servers; `kill` ends the first as the kernel's out-of-memory killer does."""

    def __enter__(self):
        self.servers = [Server(warnings_expected=True) for _ in range(3)]
        for server in self.servers:
            server.__enter__()
        self.urls = [server.url for server in self.servers]
        return self

    def kill(self):
        self.servers[0].process.kill()

    def answered(self):
        """Requests that each living replica has finished."""
        counts = []
        for server in self.servers:
            if server.process.poll() is None:
                lines = server.get("/metrics")[1].splitlines()
                counts.append(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("polylora_requests_total{")))
        return counts

    def __exit__(self, kind, *_):
        for server in self.servers:
            if server.process.poll() is None:
                server.__exit__(kind)


class Traffic:
    """Clients without retries of their own that ask for all models in turn; every answer must be the golden one."""

    def __init__(self, url):
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        self.stop, self.numbers, self.lock = threading.Event(), itertools.count(), threading.Lock()
        self.answered, self.wrong, self.cut = 0, [], 0

    def ask(self, number):
        model, adapter = MODELS[number % len(MODELS)]
        asked = dict(model=model, messages=[{"role": "user", "content": LIST_3}], temperature=0)
        if number % 3:
            return self.client.chat.completions.create(**asked).choices[0].message.content, adapter
        # What fails here has not begun: the router may try it elsewhere.
        stream = self.client.chat.completions.create(stream=True, **asked)
        text, finished = "", False
        try:
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                finished = finished or chunk.choices[0].finish_reason is not None
        except Exception:
            finished = False
        # Once a stream has begun no router can begin it anew elsewhere, but its end must not look like a whole answer's.
        return (text if finished else None), adapter

    def run(self):
        while not self.stop.is_set():
            with self.lock:
                number = next(self.numbers)
            try:
                text, adapter = self.ask(number)
            except Exception as error:
                with self.lock:
                    self.wrong.append(f"request {number}: {error!r}")
                continue
            whole = golden(adapter, "chat")["output_text"]
            with self.lock:
                self.answered += 1
                if text is None:
                    self.cut += 1
                elif text != whole:
                    self.wrong.append(f"request {number}: {text!r}, not {whole!r}")

    def until(self, condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"{self.answered} answers, {self.wrong[:3]}"
            time.sleep(0.01)


class LongStream(threading.Thread):
    """A stream of a few thousand tokens, read to its end."""

    CHOICES = 4

    def __init__(self, client, number):
        super().__init__(daemon=True)
        self.client, self.model, self.ended, self.error, self.has_begun = client, MODELS[number % len(MODELS)][0], 0, None, threading.Event()
        self.start()

    def run(self):
        try:
            stream = self.client.chat.completions.create(model=self.model, messages=[{"role": "user", "content": LIST_3}], n=self.CHOICES, stream=True,
                                                         max_tokens=1500, extra_body={"ignore_eos": True})
            for chunk in stream:
                self.has_begun.set()
                self.ended += sum(choice.finish_reason is not None for choice in chunk.choices)
        except Exception as error:
            self.error = error
        self.has_begun.set()

    @property
    def is_whole(self):
        return self.ended == self.CHOICES


def until(condition, what):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Routers(unittest.TestCase):
    def check_streams(self, router_name):
        """A replica is killed while streams run on it: those end, visibly and soon, and nothing else is touched."""
        with Replicas() as replicas, Router(router_name, replicas.urls, *TRY_AGAIN_SOON) as router:
            client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=300)
            for _ in range(10):
                streams = [LongStream(client, number) for number in range(6)]
                for stream in streams:
                    self.assertTrue(stream.has_begun.wait(120))
                    self.assertIsNone(stream.error)
                # Frozen first: what does not end now is what runs there, at most as much as now.
                sequences = replicas.servers[0].get("/v1/loads")[1]["aggregate"]["total_reqs"]
                most = math.ceil(sequences / LongStream.CHOICES)
                replicas.servers[0].process.send_signal(signal.SIGSTOP)
                others = replicas.servers[1:]
                until(lambda: all(server.get("/v1/loads")[1]["aggregate"]["total_reqs"] == 0 for server in others), "the others' streams end")
                until(lambda: sum(stream.is_whole for stream in streams) >= len(streams) - most, "the others' streams are whole")
                running = [stream for stream in streams if not stream.is_whole]
                if running:
                    break
                # They had ended before: once more.
                replicas.servers[0].process.send_signal(signal.SIGCONT)
            self.assertTrue(running, "streams run when the replica is killed")
            replicas.kill()
            for stream in running:
                stream.join(120)
                self.assertFalse(stream.is_alive(), "a stream whose replica is gone ends")
                self.assertFalse(stream.is_whole, "and does not look like a whole one")
            for stream in streams:
                if stream not in running:
                    stream.join(120)
                    self.assertIsNone(stream.error)
            # What the router may try elsewhere is not lost meanwhile.
            for model, adapter in MODELS * 2:
                answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": LIST_3}], temperature=0)
                self.assertEqual(answer.choices[0].message.content, golden(adapter, "chat")["output_text"])
            print(f"{router_name}: {len(running)} of {len(streams)} streams cut by the kill", file=sys.stderr)

    def check(self, router_name):
        with Replicas() as replicas, Router(router_name, replicas.urls, *TRY_AGAIN_SOON) as router:
            traffic = Traffic(router.url)
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                clients = [pool.submit(traffic.run) for _ in range(CLIENTS)]
                try:
                    traffic.until(lambda: traffic.answered >= 30)
                    before = replicas.answered()
                    self.assertTrue(all(count > 0 for count in before), f"each replica has its share: {before}")
                    replicas.kill()
                    after = traffic.answered + 120
                    traffic.until(lambda: traffic.answered >= after or len(traffic.wrong) > 20)
                finally:
                    traffic.stop.set()
                for client in clients:
                    client.result()
            self.assertEqual(traffic.wrong, [], f"of {traffic.answered}")
            self.assertLessEqual(traffic.cut, CLIENTS, "only streams that the killed replica had begun may be cut")
            print(f"{router_name}: {traffic.answered} answers, {traffic.cut} streams cut by the kill", file=sys.stderr)

    def check_errors(self, router_name):
        """A client's mistake stays the client's: no router may try it again elsewhere or hold it against a replica."""
        with Replicas() as replicas, Router(router_name, replicas.urls, *TRY_AGAIN_SOON) as router:
            client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0)
            for _ in range(12):
                with self.assertRaises(openai.NotFoundError):
                    client.chat.completions.create(model="demo:nobody", messages=[{"role": "user", "content": "x"}])
                with self.assertRaises(openai.BadRequestError):
                    client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x " * 20000}])
            answer = client.chat.completions.create(model="demo:json", messages=[{"role": "user", "content": LIST_3}], temperature=0)
            self.assertEqual(answer.choices[0].message.content, golden("json", "chat")["output_text"])
            completion = client.completions.create(model="demo:json", prompt=golden("json", "raw")["prompt"], max_tokens=96, temperature=0)
            self.assertEqual(completion.choices[0].text, golden("json", "raw")["output_text"])

    def test_sglang_router_loses_nothing_when_a_replica_is_killed(self):
        self.check("sglang-router")

    def test_vllm_router_loses_nothing_when_a_replica_is_killed(self):
        self.check("vllm-router")

    def test_sglang_router_ends_the_streams_of_a_killed_replica(self):
        self.check_streams("sglang-router")

    def test_vllm_router_ends_the_streams_of_a_killed_replica(self):
        self.check_streams("vllm-router")

    def test_sglang_router_hands_on_errors(self):
        self.check_errors("sglang-router")

    def test_vllm_router_hands_on_errors(self):
        self.check_errors("vllm-router")


if __name__ == "__main__":
    unittest.main()
