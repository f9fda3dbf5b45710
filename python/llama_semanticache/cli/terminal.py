"""Messages typed at a terminal: pasted ones of several lines, history, completion."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..models import cache_dir

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document


def message_reader(commands: Iterable[str], file_commands: Iterable[str]) -> Callable[[], str]:
    """A function that asks for one message, which may have several lines: a paste is one message, and Alt-Enter begins
    a new line. What is typed is kept for the next time in a file of the user's cache folder that nobody else can read.
    The function raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C.

    Parameters
    ----------
    commands, file_commands : iterable of str
        What Tab completes at the beginning of a message; behind the latter it completes paths.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, PathCompleter
    from prompt_toolkit.document import Document as Text
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    names, with_file = sorted({*commands, *file_commands}), tuple(f"{name} " for name in file_commands)
    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            from prompt_toolkit.completion import Completion

            text = document.text_before_cursor
            if text.startswith(with_file):
                yield from paths.get_completions(Text(text.split(" ", 1)[1]), complete_event)
            elif text.startswith("/"):
                yield from (Completion(name, -len(text)) for name in names if name.startswith(text))

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history: History
    try:
        file = cache_dir() / "chat-history"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        history = FileHistory(str(file))
    except OSError:  # nowhere to write to
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        "> ",
        history=history,
        completer=Commands(),
        complete_while_typing=False,
        key_bindings=keys,
        prompt_continuation="  ",
    )
    return session.prompt
