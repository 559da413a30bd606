#!/usr/bin/env python3
"""Check the licence of every package that a build of the workspace uses against the list in deny.toml, with nothing but cargo and Python 3.11.

The same rule as `cargo deny check licenses`, for machines without cargo-deny: every `A AND B` part must be allowed, one of `A OR B` suffices.
"""
import json
import os
import re
import subprocess
import sys
import tomllib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def allowed(expression, names):
    """Evaluates an SPDX expression; `/` is Cargo's old spelling of OR."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))
    python, index = [], 0
    while index < len(tokens):
        token = tokens[index]
        if token in ("(", ")"):
            python.append(token)
        elif token in ("AND", "OR"):
            python.append(token.lower())
        else:
            if tokens[index + 1:index + 2] == ["WITH"]:
                token, index = f"{token} WITH {tokens[index + 2]}", index + 2
            # "X WITH exception" grants more than X.
            python.append(str(token in names or token.split(" WITH ")[0] in names))
        index += 1
    return eval(" ".join(python))               # only True, False, and, or and parentheses


def main():
    with open(os.path.join(ROOT, "deny.toml"), "rb") as file:
        names = set(tomllib.load(file)["licenses"]["allow"])
    host = re.search(r"host: (\S+)", subprocess.run(["rustc", "-vV"], capture_output=True, text=True, check=True).stdout).group(1)
    metadata = json.loads(subprocess.run(["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", host], cwd=ROOT,
                                         capture_output=True, text=True, check=True).stdout)
    used = {node["id"] for node in metadata["resolve"]["nodes"]}
    packages = [package for package in metadata["packages"] if package["id"] in used]
    refused = []
    for package in packages:
        expression = package["license"] or ""
        if not expression or not allowed(expression, names):
            refused.append(f"{package['name']} {package['version']}: {expression or 'no license field'}")
    print(f"licences: {len(packages)} packages, {len(refused)} refused")
    if refused:
        sys.exit("\n".join(refused))


if __name__ == "__main__":
    main()
