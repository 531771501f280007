#!/usr/bin/env python3
"""Writes the source that compiles one kernel file into the emulated driver and registers its kernels.

Kernels are what stands as `extern "C" __global__` in the preprocessed file, so that macros that make several are seen.

    g++ -E -DEMU_LISTING ... FILE.cu | table.py FILE.cu FOLDER_OF_KERNELS > FILE.cpp
"""
import pathlib
import re
import sys

KERNEL = re.compile(r'extern\s+"C"\s+EMU_KERNEL\s+void\s*')


def bounds_at(text, at):
    """The arguments of EMU_BOUNDS(...) if it stands at `at`, and where the text goes on."""
    if not text.startswith("EMU_BOUNDS", at):
        return "", at
    start = text.index("(", at)
    depth, end = 0, start
    while True:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
        if not depth:
            return text[start + 1 : end - 1].strip(), end


def kernels_in(text):
    """(name, launch bounds) of each kernel."""
    for match in KERNEL.finditer(text):
        bounds, at = bounds_at(text, match.end())
        name = re.match(r"\s*(\w+)\s*\(", text[at:])
        if not name:
            sys.exit(f"no kernel's name in: {text[at : at + 80]!r}")
        yield name.group(1), bounds


def uses_of(resources):
    """What ptxas reported for sm_90a, by kernel: (registers, static shared memory)."""
    found, kernel = {}, None
    for line in resources.splitlines():
        if line.startswith("["):
            kernel = line.strip("[]")
        elif line.startswith("sm_90a"):
            numbers = re.findall(r"\d+", line.split("=")[1])
            found[kernel] = (int(numbers[0]), int(numbers[2]))
    return found


def main():
    source, kernels = map(pathlib.Path, sys.argv[1:3])
    table = kernels / "resources.toml"
    text = re.sub(r"^#.*$", "", sys.stdin.read(), flags=re.M)
    uses = uses_of(table.read_text()) if table.exists() else {}
    headers = sorted(path.name for path in kernels.glob("*.cuh"))
    print("// Made by table.py.")
    for header in headers:
        print(f'#include "{header}"')
    print('#include "table.h"')
    print(f'namespace {source.stem}_file {{\n#include "{source.name}"')
    for name, bounds in kernels_in(text):
        registers, shared = uses.get(name, (64, 0))
        print(f"EMU_REGISTER({name}, {shared}, {registers}{', ' if bounds else ''}{bounds})")
    print("}")


main()
