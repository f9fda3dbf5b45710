"""Streaming one answer, with Ctrl-C stopping it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..llama import Llama


class TokenMeter:
    """Context in which the tokens that `llm` generates are timed.

    llama_cpp has no hook for this: a chunk of a stream can stand for several tokens, and llama.cpp's own timer loses
    the batches that come after a pass. So generate() is wrapped for as long as the context lasts.

    Attributes
    ----------
    prefill_s : float or None
        Seconds from the start of the context to the first token; None if there was none.
    decode_s : float
        Seconds from the first token to the last.
    n_decoded : int
        Tokens after the first one.
    """

    def __init__(self, llm: Llama):
        self.llm = llm
        self.prefill_s: float | None = None
        self.decode_s = 0.0
        self.n_decoded = 0
        self._first = 0.0  # when the first token came

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed; None if there were too few tokens to tell."""
        return self.n_decoded / self.decode_s if self.decode_s else None

    def __enter__(self) -> TokenMeter:
        self._begin = time.perf_counter()
        self.llm.generate = self._generate  # type: ignore[method-assign,assignment]  # for as long as the context lasts
        return self

    def __exit__(self, *_exception: object) -> None:
        del self.llm.generate  # the method of the class is back

    def _generate(self, tokens: list[int], *args: Any, **kwargs: Any) -> Iterator[int]:
        stream = type(self.llm).generate(self.llm, tokens, *args, **kwargs)
        try:
            for token in stream:
                now = time.perf_counter()
                if self.prefill_s is None:
                    self.prefill_s = now - self._begin
                    self._first = now
                else:
                    self.n_decoded += 1
                    self.decode_s = now - self._first
                yield token
        finally:
            stream.close()


SILENT_S = 1.0  # a text that is read within this time needs no progress


@contextmanager
def reading(llm: Llama) -> Iterator[None]:
    """Context in which `llm` shows how far it has read a long text, on a terminal: tokens, their speed, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    count = TextColumn("reading {task.completed:,} of {task.total:,} tokens")
    speed = TextColumn("{task.fields[speed]:.0f} tokens/s")
    progress = Progress(count, BarColumn(), speed, TimeRemainingColumn(), console=console, transient=True)
    begin = time.perf_counter()
    task = progress.add_task("", total=1, speed=0.0)

    def show(done: int, total: int) -> None:
        seconds = time.perf_counter() - begin
        progress.update(task, completed=done, total=total, speed=done / seconds)
        if done == total:
            progress.stop()
        elif seconds > SILENT_S and console.is_terminal and not progress.live.is_started:
            progress.start()

    llm.on_progress = show
    try:
        yield
    finally:
        llm.on_progress = None
        progress.stop()


@dataclass
class Answer:
    """An answer as far as it got.

    Attributes
    ----------
    text : str
    finish_reason : str or None
        "stop", "length", or None if it was interrupted.
    interrupted : bool
        By Ctrl-C.
    """

    text: str = ""
    finish_reason: str | None = None
    interrupted: bool = False


def explain(error: Exception, remedy: str = "shorten the text or start with a larger --n-ctx") -> str:
    """Message of an error, with what to do where a prompt does not fit and llama_cpp's own does not say."""
    return f"{error}; {remedy}" if is_overflow(error) else str(error)


def is_overflow(error: Exception) -> bool:
    """Whether a prompt does not fit, by llama_cpp's message."""
    return "exceed context window" in str(error)


def _echo(text: str) -> None:
    click.echo(text, nl=False)


def stream_answer(chunks: Any, answer: Answer, write: Callable[[str], None] = _echo) -> None:
    """Write a stream of completion or chat completion chunks out and into `answer`, valid even if this raises.

    Parameters
    ----------
    chunks : iterator of dict
        What create_completion or create_chat_completion returned with stream=True.
    answer : Answer
        Filled as the text comes.
    write : function
        Shows a piece of text; on stdout by default.
    """
    try:
        for chunk in chunks:
            choice = chunk["choices"][0]
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            if text:
                answer.text += text
                write(text)
    except KeyboardInterrupt:
        answer.interrupted = True
        answer.finish_reason = None
    finally:
        if hasattr(chunks, "close"):
            chunks.close()
