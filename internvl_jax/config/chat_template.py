"""Recognizing a checkpoint's conversation template by what its chat_template renders.

In transformers' layouts the template is a Jinja program. It does not make prompts here: it renders two short
conversations, and the known template (conversation_templates.py) with the same prompts is used. Differences between
published files of one model are ignored: a leading bos token, whether the system message is written, and whether an
answer ends with the eos token, a space or both.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from internvl_jax.config.conversation_templates import IMAGE_PLACEHOLDER, TEMPLATES, Template, build_prompt
from internvl_jax.utils import files

LARGEST = 1 << 20  # bytes of a template
SECONDS = 60  # limit on rendering, including process start; the limit on processor time is far lower

QUESTIONS, ANSWER = ("What is shown?", "Where is it?"), "A red bird."


def find_template(directory: Path, layout: str) -> str | None:
    """Return the name of the conversation template that a checkpoint's chat_template renders.

    LLaVA's own layout has no chat_template; as in LLaVA's code, the directory's name tells Llama 2's template.

    Args:
        directory: the checkpoint directory.
        layout: its layout, one of LAYOUTS.

    Returns:
        A name in TEMPLATES; None where the checkpoint has no chat_template; for an unknown template, a name that is not
        in TEMPLATES and names the file.

    Raises:
        OSError: a file cannot be read.
        TextError: a file is not JSON.
    """
    found = _chat_template(directory)
    if found is None:
        return "llava_llama_2" if layout == "llava" and "llama-2" in directory.resolve().name.lower() else None
    where, text = found
    tokens = _tokens(directory)
    name = recognize(text, *tokens) if isinstance(text, str) else None
    return name or f"the chat_template of {where}"


@lru_cache(maxsize=16)
def recognize(chat_template: str, bos: str = "<s>", eos: str = "</s>") -> str | None:
    """Return the name of the known template with the same prompts; None where there is none or rendering fails."""
    asked, then = QUESTIONS
    first = f"{IMAGE_PLACEHOLDER}\n{asked}"
    plain = [_message("user", first), _message("assistant", ANSWER), _message("user", then)]
    listed = [_listed(message) for message in plain]
    alone = [_message("user", then)]
    variables = {"bos_token": bos, "eos_token": eos}
    rendered = _render(chat_template, [plain, alone, listed, [_listed(alone[0])]], variables)
    for name, template in TEMPLATES.items():
        ours = build_prompt(template, [(first, ANSWER)], then), build_prompt(template, [], then)
        expected = [_without_details(text, template, bos, eos) for text in ours]
        for pair in (rendered[:2], rendered[2:]):
            if [text and _without_details(text, template, bos, eos) for text in pair] == expected:
                return name
    return None


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _listed(message: dict[str, Any]) -> dict[str, Any]:
    """The message with a list of parts as its content, which transformers' processors expect."""
    image, _, text = message["content"].rpartition(f"{IMAGE_PLACEHOLDER}\n")
    parts = [{"type": "image"}] if image or text != message["content"] else []
    return {**message, "content": [*parts, {"type": "text", "text": text}]}


def _without_details(text: str, template: Template, bos: str, eos: str) -> str:
    text = text.removeprefix(bos).lstrip(" ").removeprefix(template.system)
    return re.sub(" +", " ", text.replace(eos, " ").replace(template.answer_end, " ")).strip(" ")


def _render(chat_template: str, conversations: list[Any], variables: dict[str, str]) -> list[str | None]:
    """Render each conversation in a subprocess; None where the template raises, all None on a timeout."""
    nothing: list[str | None] = [None] * len(conversations)
    work = {"template": chat_template, "conversations": conversations, "variables": variables}
    try:
        done = subprocess.run(
            # -P: keeps the modules beside render_template.py off sys.path.
            [sys.executable, "-P", str(Path(__file__).with_name("render_template.py"))],
            input=json.dumps(work).encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
        return json.loads(done.stdout) if done.returncode == 0 else nothing
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return nothing


def _chat_template(directory: Path) -> tuple[str, Any] | None:
    """The file name and the template, searched in transformers' order; None as the template where it is too large."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.name, files.read_text(path) if path.stat().st_size <= LARGEST else None
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        value = _values(directory / name).get("chat_template")
        if isinstance(value, list):  # of named ones
            value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        if isinstance(value, dict):
            value = next(iter(value.values())) if len(value) == 1 else value.get("default", value)
        if value is not None:
            return name, value if len(str(value)) <= LARGEST else None
    return None


def _tokens(directory: Path) -> tuple[str, str]:
    values = {**_values(directory / "special_tokens_map.json"), **_values(directory / "tokenizer_config.json")}

    def content(name: str, default: str) -> str:
        value = values.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) and value else default

    return content("bos_token", "<s>"), content("eos_token", "</s>")


def _values(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file. An unreadable file raises: it may hold the template."""
    try:
        value = files.read_json(path)
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}
