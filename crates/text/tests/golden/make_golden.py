"""Renders every template of ../shared/data/chat-templates with Hugging Face transformers.

Usage, from the repository's root, in a venv with transformers and jinja2:
    python crates/text/tests/golden/make_golden.py

Writes beside this script `cases.json` (the inputs) and one file per template with, for each case,
the expected text, the message of raise_exception, or the type of a Python error. The texts are our
own conversations; the templates themselves are not copied.
"""

import copy
import datetime
import json
import pathlib

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

HERE = pathlib.Path(__file__).resolve().parent
TEMPLATES = HERE.parents[3].parent / "shared" / "data" / "chat-templates"
NOW = datetime.datetime(2025, 3, 9, 14, 5, 6)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Donne la météo d'une ville <en> \"direct\".",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city"},
                    "days": {"type": "integer", "description": "How many days", "default": 1.0},
                    "unit": {"type": "string", "enum": ["celsius", "kelvin"], "description": "Unit"},
                    "tags": {"type": "array", "items": {"type": "string"}, "description": "Labels"},
                },
                "required": ["city"],
            },
        },
    }
]


def conversation(arguments):
    return [
        {"role": "system", "content": "Tu réponds en français."},
        {"role": "user", "content": "Quel temps fait-il à Paris ?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "abcdefghi",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": arguments},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": '{"ciel": "clair"}'},
        {"role": "assistant", "content": "Il fait beau — 21 °C."},
        {"role": "user", "content": "Merci 😀 & à demain <b>"},
    ]


PLAIN = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "Hello\n there "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi."},
    {"role": "user", "content": "And now?"},
]
ARGUMENTS = {"city": "Paris", "days": 2, "tags": ["a", "é"]}
SPECIAL = {"bos_token": "<BOS>", "eos_token": "<EOS>"}


def render(source, case):
    template = _compile_jinja_template(source)
    template.environment.globals["strftime_now"] = NOW.strftime
    template.globals["strftime_now"] = NOW.strftime
    case = copy.deepcopy(case)
    return template.render(
        messages=case["messages"],
        tools=case["tools"],
        documents=None,
        add_generation_prompt=case["add_generation_prompt"],
        **SPECIAL,
        **case["kwargs"],
    )


def case(name, messages, tools=None, prompt=True, **kwargs):
    return {
        "name": name,
        "messages": messages,
        "tools": tools,
        "add_generation_prompt": prompt,
        "kwargs": kwargs,
    }


def cases():
    yield case("plain", PLAIN)
    yield case("no system, no prompt", PLAIN[1:3], prompt=False)
    yield case("thinking off", PLAIN[:2], enable_thinking=False)
    yield case("parts", [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])
    for form, arguments in (("object", ARGUMENTS), ("text", json.dumps(ARGUMENTS, ensure_ascii=False))):
        yield case(f"tool history, arguments as {form}", conversation(arguments))
        yield case(f"tools, arguments as {form}", conversation(arguments), TOOLS)
    yield case("tools, first turn", PLAIN[:2], TOOLS)
    yield case("two system messages", PLAIN[:1] + PLAIN)
    yield case("developer", [{"role": "developer", "content": "Be kind."}, PLAIN[1]])


def main():
    inputs = list(cases())
    write("cases", {entry.pop("name"): entry for entry in copy.deepcopy(inputs)})
    for path in sorted(TEMPLATES.glob("*.jinja")):
        out = {}
        for entry in inputs:
            try:
                result = {"expected": render(path.read_text(), entry)}
            except jinja2.exceptions.TemplateError as error:
                result = {"raised": error.message}
            except Exception as error:
                result = {"failed": f"{type(error).__name__}: {error}"}
            out[entry["name"]] = result
        write(path.stem, out)


def write(name, cases_by_name):
    """One case a line, so that a change of one case is a change of one line."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in cases_by_name.items()
    ]
    (HERE / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
