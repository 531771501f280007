"""Every option of the server, asked of the server itself.

An unknown key is an error that names the known ones; a value of the wrong type is an error too. From these two the
tree of options and one value for each is found, so that no list is kept by hand.
"""

import pathlib
import re
import subprocess
import tempfile

from chart import MIRAI

# Tried in turn until the server takes one; where a word is wanted its error names the right ones.
CANDIDATES = (True, 7, 2000, 0.5, "auto", "info", "127.0.0.1", "127.0.0.1:9100", "file", ["a"], {})


def toml(path, value):
    """A file that sets one key; maps are empty tables."""
    if value == {}:
        return f"[{path}]\n"
    section, _, key = path.rpartition(".")
    text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
    return (f"[{section}]\n" if section else "") + f"{key} = {text}\n"


def ask(text, *flags):
    """What `check-config` says of a file: (whether it is accepted, all output)."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "mirai.toml"
        file.write_text(text)
        command = [MIRAI, "check-config", "--config", str(file), *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    return done.returncode == 0, done.stdout + done.stderr


def keys_of(path):
    """The keys below a path, by the error for one that none has; none where the path is no table."""
    said = ask(toml(f"{path}.no_such_option" if path else "no_such_option", 1))[1]
    found = re.search(r"unknown field `no_such_option`, expected (?:one of )?(.*)", said)
    return re.findall(r"`([^`]+)`", found.group(1)) if found else []


def value_of(path):
    """A value that parses as the option's type, and what the server said if none does."""
    said = ""
    for candidate in CANDIDATES:
        accepted, said = ask(toml(path, candidate))
        # A value out of bounds, a file that is not there, or one of several that belong together: of the right type.
        if accepted or "TOML parse error" not in said or "missing field" in said:
            return candidate, said
        if words := re.findall(r"expected (?:one of )?`([^`]+)`", said):
            if ask(toml(path, words[0]))[0]:
                return words[0], said
    return None, said


def tree(path=""):
    """All options as dotted path -> a value of its type."""
    options = {}
    for key in keys_of(path):
        inner = f"{path}.{key}" if path else key
        below = tree(inner)
        options.update(below or {inner: value_of(inner)[0]})
    return options
