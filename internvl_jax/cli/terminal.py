"""Reads questions from a terminal: several lines, bracketed paste, history and completion. Imports prompt_toolkit."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output


class _Commands(Completer):
    """Completes commands, and file names behind /image."""

    def __init__(self, commands: Mapping[str, str]):
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if text.startswith("/image "):
            name = text.removeprefix("/image ").lstrip()
            yield from self._paths.get_completions(Document(name, len(name)), complete_event)
        elif text.startswith("/") and " " not in text:
            for command in self._commands:
                if command.startswith(text):
                    yield Completion(command, start_position=-len(text), display_meta=self._commands[command].strip())


class Prompt:
    """Asks for a question; prompts go to stderr, because stdout is for answers.

    Args:
        commands: Commands to complete, with their help.
    """

    def __init__(self, commands: Mapping[str, str]):
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation="  ",
            completer=_Commands(commands),
            complete_while_typing=False,
            key_bindings=_keys(),
            output=create_output(stdout=sys.stderr),
        )

    def __call__(self, prompt: str) -> str:
        """Raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C."""
        return self._session.prompt(prompt)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
