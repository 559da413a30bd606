#!/usr/bin/env python3
"""Run the SDK tests and SGLang's walk-through against a built server.

    pip install -r tests/sdk/requirements.txt && npm install --prefix tests/sdk
    python tests/sdk/run.py --server target/debug/polylora
    POLYLORA_FLAGS="--device cuda" python tests/sdk/run.py --server target/release/polylora     # flags for every server that the tests start
"""
import argparse
import os
import subprocess
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="the polylora binary")
    os.environ["POLYLORA"] = os.path.abspath(parser.parse_args().server)
    sys.path.insert(0, HERE)
    from server import Server, keys_file
    result = unittest.TextTestRunner(verbosity=2).run(unittest.defaultTestLoader.discover(HERE))
    with keys_file() as keys, Server() as server, Server("--api-keys-file", keys.name) as keyed:
        environment = {**os.environ, "POLYLORA_URL": server.url, "POLYLORA_KEYS_URL": keyed.url}
        node = subprocess.run(["node", "--test", os.path.join(HERE, "openai.test.mjs")], env=environment)
    with Server("--max-loras-per-batch", "2", "--max-loaded-loras", "6") as server:
        churn = subprocess.run([sys.executable, os.path.join(HERE, "churn.py"), "--url", server.url, "--seconds", "10"])
    if not result.wasSuccessful() or node.returncode or churn.returncode:
        sys.exit("SDK tests failed")


if __name__ == "__main__":
    main()
