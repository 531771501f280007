"""Every option of the server, asked of the server itself.

An unknown key is an error that names the known ones; a value of the wrong type is an error too. From these two the
tree of options and one value for each is found, so that no list is kept by hand.
"""

import json
import pathlib
import re
import subprocess
import tempfile

from chart import MIRAI

# Tried in turn until the server takes one; where a word is wanted its error names the right ones.
CANDIDATES = (True, 7, 2000, 0.5, "auto", "info", "127.0.0.1", "127.0.0.1:9100", "file", ["a"])


def toml(path, key, value):
    """A file that sets one key of a table; the last part of the path is `name[]` in a list of tables."""
    lines = []
    for depth in range(1, len(path) + 1):
        part = path[depth - 1]
        name = ".".join(p.removesuffix("[]") for p in path[:depth])
        if part.endswith("[]"):
            lines.append(f"[[{name}]]")
        elif depth == len(path):
            lines.append(f"[{name}]")
    # JSON's scalars and lists of them are TOML's.
    return "\n".join([*lines, f"{key} = {json.dumps(value)}"]) + "\n"


def ask(text, *flags):
    """What `check-config` says of a file: (whether it is accepted, all output)."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "mirai.toml"
        file.write_text(text)
        command = [MIRAI, "check-config", "--config", str(file), *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    return done.returncode == 0, done.stdout + done.stderr


def keys_of(path):
    """The keys of a table, by the error for one that none has; None where the path is no table."""
    found = re.search(r"unknown field `no_such_option`, expected (?:one of )?(.*)", ask(toml(path, "no_such_option", 1))[1])
    return re.findall(r"`([^`]+)`", found.group(1)) if found else None


def value_of(path, key):
    """A value that parses as the option's type; None if none was found."""
    for candidate in CANDIDATES:
        accepted, said = ask(toml(path, key, candidate))
        # A value out of bounds, a file that is not there, or one of several that belong together: of the right type.
        if accepted or "TOML parse error" not in said or "missing field" in said:
            return candidate
        if words := re.findall(r"expected (?:one of )?`([^`]+)`", said):
            for word in (words[0], [words[0]]):
                if ask(toml(path, key, word))[0] or "TOML parse error" not in ask(toml(path, key, word))[1]:
                    return word
    return None


def tree(path=()):
    """All options as nested maps with a value of its type for each; lists of tables have one table."""
    options = {}
    for key in keys_of(path) or []:
        # Tables first: a table may also be given as a list of its values, and no one means that.
        if keys_of((*path, key)) is not None:
            options[key] = tree((*path, key))
        elif keys_of((*path, f"{key}[]")) is not None:
            options[key] = [tree((*path, f"{key}[]"))]
        else:
            options[key] = value_of(path, key)
    return options


def flat(options, path=""):
    """(dotted path, value) of every option."""
    for key, value in options.items():
        inner = f"{path}.{key}" if path else key
        below = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        if isinstance(below, dict):
            yield from flat(below, inner)
        else:
            yield inner, value
