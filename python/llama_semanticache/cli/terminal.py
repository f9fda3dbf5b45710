"""A conversation at a terminal: messages of several lines, history, completion; answers in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..models import cache_dir

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document


def message_reader(commands: Iterable[str], file_commands: Iterable[str]) -> Callable[[str], str]:
    """A function that asks for one message, given a text to begin with. The message may have several lines: a paste is
    one message, and Alt-Enter begins a new line. What is typed is kept for the next time in a file of the user's cache
    folder that nobody else can read. The function raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C.

    Parameters
    ----------
    commands, file_commands : iterable of str
        What Tab completes at the beginning of a message; behind the latter it completes paths.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, PathCompleter
    from prompt_toolkit.document import Document as Text
    from prompt_toolkit.formatted_text import HTML
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
        HTML("<b><ansicyan>&gt; </ansicyan></b>"),  # told apart from answers
        history=history,
        completer=Commands(),
        complete_while_typing=False,
        key_bindings=keys,
        prompt_continuation="  ",
    )
    return lambda text: session.prompt(default=text)


class MarkdownStream:
    """Context that shows Markdown on stdout while it comes: what is finished stays, what is not is drawn anew."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(highlight=False)
        self.live = Live(console=self.console, transient=True, refresh_per_second=10)
        self.rest = ""  # not finished yet
        self.n_blocks = 0

    def __enter__(self) -> MarkdownStream:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.live.is_started:
            self.live.update("")
            self.live.stop()
        self._print(self.rest)

    def write(self, text: str) -> None:
        """More of it."""
        from rich.markdown import Markdown
        from rich.text import Text

        if not self.live.is_started:  # not before: the progress of a long text has the line until then
            self.live.start()
        finished, self.rest = finished_blocks(self.rest + text)
        self._print(finished)
        lines = self.rest.splitlines()
        room = self.console.height - 3
        # rich would cut off the end, which is what one wants to see
        self.live.update(Markdown(self.rest) if len(lines) <= room else Text("\n".join(lines[-room:])))

    def _print(self, text: str) -> None:
        from rich.markdown import Markdown

        if text.strip():
            if self.n_blocks:
                self.console.print()
            self.console.print(Markdown(text))
            self.n_blocks += 1


def finished_blocks(text: str) -> tuple[str, str]:
    """A Markdown text in two, of which the first is not changed by what comes: it ends with an empty line outside of
    code, and what follows begins in the first column with something else than an item of a list.
    """
    end = position = 0
    fence = ""
    empty = False  # the line before
    for line in text.splitlines(keepends=True):
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) else fence
        else:
            if empty and re.match(r"[^\s\d*+-]", line):
                end = position
            fence = mark[1] if mark else ""
        empty = not fence and line == "\n"
        position += len(line)
    return text[:end], text[end:]
