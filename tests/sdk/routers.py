"""Other projects' gateways as context managers: PyPI's sglang-router and vllm-router, as they are."""
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

from server import free_port

ROUTERS = {
    "sglang-router": [sys.executable, "-m", "sglang_router.launch_router"],
    "vllm-router": [os.path.join(os.path.dirname(sys.executable), "vllm-router")],
}


class Router:
    """A router's process on a free port, ready when it has found its workers well."""

    def __init__(self, name, workers, *options):
        self.command = [*ROUTERS[name], "--host", "127.0.0.1", "--policy", "round_robin", "--worker-urls", *workers, *options]

    def __enter__(self):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        command = [*self.command, "--port", str(port), "--prometheus-port", str(free_port())]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/v1/models", timeout=5).close()
                return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    with open(self.log.name, encoding="utf-8", errors="replace") as file:
                        raise RuntimeError(f"the router did not start:\n{file.read()}")
                time.sleep(0.1)

    def __exit__(self, *_):
        # Its own group: the launcher may have started others.
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(timeout=20)
