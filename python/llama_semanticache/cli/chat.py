"""llama-semanticache chat: an interactive conversation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import KVConfig
from ..errors import SemanticCacheError
from ..models import read_text
from .answer import Answer, TokenMeter, explain, is_overflow, reading, stream_answer
from .common import (
    LoadOptions,
    SamplingOptions,
    in_options,
    kv_line,
    llama_options,
    load_llama,
    model_argument,
    note,
    sampling_field,
    sampling_options,
    stats_dict,
)

if TYPE_CHECKING:
    from ..llama import Llama
    from ..model_file import ModelFile

HELP = """\
/read FILE       put a text before the next message
/regen           another answer to the last message
/edit TEXT       another last message; without TEXT: change it
/system TEXT     the system message; without TEXT: none
/set NAME VALUE  how tokens are chosen, as in /set temp 0; without NAME: show
/stats           everything about the KV cache
/drop N          forget the first N messages and their answers (1)
/reset           forget the conversation, but for the system message
/save FILE       write the conversation and the cache to a file
/load FILE       go on with a conversation that was saved, of another model or n_ctx too
/help            this text
/quit            leave; so do /exit, /bye and Ctrl-D. Ctrl-C stops an answer.
A message may have several lines: paste them, or begin a new one with Alt-Enter."""

COMMANDS = ("/help", "/stats", "/drop", "/reset", "/regen", "/edit", "/system", "/set", "/quit", "/exit", "/bye")
ALIASES = {"/?": "/help", "/clear": "/reset"}  # of Ollama
FILE_COMMANDS = ("/read", "/save", "/load")
NO_ROOM = "shorten the message or forget old ones with /drop"
LARGER = ", or /save FILE, start with a larger --n-ctx and go on with /load FILE"
N_SHOWN = 300  # letters of a message, where the end of a conversation is shown


@click.command()
@model_argument
@click.option("--system", help="System message that the conversation begins with.")
@click.option("--plain", is_flag=True, help="Show answers as the model writes them, not as Markdown.")
@sampling_options
@llama_options
def chat(model: str, system: str | None, plain: bool, sampling: SamplingOptions, load: LoadOptions) -> None:
    """Talk with MODEL. Type /help for the commands."""
    llm, model_file = load_llama(model, load)
    ask: Callable[[str], str] | None = None
    if sys.stdin.isatty():
        from .terminal import message_reader

        ask = message_reader(COMMANDS, FILE_COMMANDS)
    markdown = not plain and sys.stdout.isatty()
    conversation = Conversation(llm, model_file, load, sampling, system, ask, markdown)
    if ask is not None:
        note(f"{model_file.name}, {llm.n_ctx():,} tokens of context. /help lists the commands.", style="dim")
    at_prompt = True
    while True:
        try:
            at_prompt = True
            line = _read_line(ask)
            at_prompt = False
            if line is None or not conversation.take(line.strip()):
                return
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /quit leaves)" if at_prompt else "(stopped)", style="dim")


def _read_line(ask: Callable[[str], str] | None) -> str | None:
    """One message from the terminal, or one line of stdin; None at its end."""
    if ask is None:
        return sys.stdin.readline() or None
    try:
        return ask("")
    except EOFError:
        return None


class Conversation:
    """The messages of a chat and the model that answers them.

    Parameters
    ----------
    llm : Llama
    model : ModelFile
    load : LoadOptions
        What `llm` was loaded with.
    sampling : SamplingOptions
    system : str or None
        First message.
    ask : function, optional
        Asks for a message at a terminal, given a text to begin with.
    markdown : bool
        Show answers as Markdown.
    """

    def __init__(
        self,
        llm: Llama,
        model: ModelFile,
        load: LoadOptions,
        sampling: SamplingOptions,
        system: str | None,
        ask: Callable[[str], str] | None = None,
        markdown: bool = False,
    ):
        self.llm = llm
        self.ask = ask
        self.markdown = markdown
        self.model = model
        self.load = load
        self.sampling = sampling
        self.first = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.first)
        self.texts: list[str] = []  # for the next message
        n_ctx_train = model.shape.n_ctx_train
        can_grow = not n_ctx_train or llm.n_ctx() < n_ctx_train
        self.no_room = NO_ROOM + LARGER if can_grow else NO_ROOM

    def take(self, line: str) -> bool:
        """Answer a message or obey a command; False if it was /quit."""
        if not line:
            return True
        if not line.startswith("/"):
            if self.answer("\n\n".join([*self.texts, line])):
                self.texts.clear()
            return True
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/quit", "/exit", "/bye"):
            return False
        name = ALIASES.get(name, name)
        commands = {"/help": self.help, "/stats": self.stats, "/reset": self.reset, "/regen": self.regenerate}
        with_text = {"/system": self.instruct, "/set": self.set, "/edit": self.edit, "/drop": self.drop}
        file_commands = {"/read": self.read, "/save": self.save, "/load": self.restore}
        try:
            if name in commands:
                commands[name]()
            elif name in with_text:
                with_text[name](argument)
            elif name in file_commands and argument:
                file_commands[name](Path(argument).expanduser())
            elif name in file_commands:
                note(f"{name} needs a file name: {name} FILE", style="red")
            else:
                note(f"{name} is not a command; /help lists them", style="red")
        except (SemanticCacheError, OSError, RuntimeError, ValueError) as error:  # whatever a name may be wrong in
            self.report(error)
        return True

    def report(self, error: Exception) -> None:
        """Show an error; with --verbose, its traceback."""
        if self.load.verbose:
            import traceback

            note("".join(traceback.format_exception(type(error), error, error.__traceback__)))
        note(f"Error: {in_options(explain(error, self.no_room))}", style="red")

    def answer(self, text: str) -> bool:
        """Stream the answer to a message. The history keeps both, as far as the answer got; whether it does.

        A message to which nothing was answered is not kept: after an error, the next one may fit; after Ctrl-C, an
        empty answer in the history would teach the model to be silent.
        """
        message = {"role": "user", "content": text}
        answer = Answer()
        failed = None
        meter = TokenMeter(self.llm)
        try:
            with meter, reading(self.llm):
                messages: list[Any] = [*self.messages, message]
                chunks = self.llm.create_chat_completion(messages, stream=True, **self.sampling.arguments())
                self._show(chunks, answer)
        except KeyboardInterrupt:
            answer.interrupted = True
        except (SemanticCacheError, ValueError, RuntimeError) as error:
            failed = error
        if answer.text and not self.markdown:
            click.echo()
        kept = bool(answer.text) or (failed is None and not answer.interrupted)
        if kept:
            self.messages += [message, {"role": "assistant", "content": answer.text}]
        if failed is not None:
            self.report(failed)
        if not kept:
            without = "this message"
            if self.texts and failed is not None and is_overflow(failed):
                self.texts.clear()  # with them no message would fit
                without += " and the texts of /read"
            note(f"(the conversation goes on without {without})", style="dim")
        elif answer.interrupted:
            note("(stopped)", style="dim")
        elif answer.finish_reason == "length":
            full = self.llm.n_tokens >= self.llm.n_ctx() - 1
            note(f"(the context is full: {self.no_room})" if full else "(cut off by max-tokens, see /set)", style="dim")
        note(kv_line(self.llm.kv_stats(), meter.tokens_per_s), style="dim")
        return kept

    def _show(self, chunks: Any, answer: Answer) -> None:
        if not self.markdown:
            stream_answer(chunks, answer)
            return
        from .terminal import MarkdownStream

        with MarkdownStream() as shown:
            stream_answer(chunks, answer, shown.write)

    def help(self) -> None:
        """List the commands."""
        note(HELP)

    def read(self, file: Path) -> None:
        """Keep a text for the next message."""
        text = read_text(file).strip()
        n, n_before = (
            len(self.llm.tokenize(part.encode(), add_bos=False, special=False))
            for part in (text, "".join(f"{before}\n\n" for before in self.texts))
        )
        if n + n_before >= self.llm.n_ctx():
            before = f" and {n_before:,} of what was read before" if self.texts else ""
            raise ValueError(
                f"{file}: expected fewer tokens than the context has, {self.llm.n_ctx():,}, got {n:,}{before}; shorten "
                "it or start with a larger --n-ctx"
            )
        self.texts.append(text)
        note(f"({file.name}: {n:,} tokens; it is read with your next message)", style="dim")

    def regenerate(self) -> None:
        """Answer the last message once more."""
        if self.has_answer():
            self._answer_instead(self.messages[-2]["content"])

    def edit(self, text: str) -> None:
        """Answer another message instead of the last one; without a text, one that is typed now."""
        if not self.has_answer():
            return
        if not text and self.ask is None:
            note("/edit needs a text: /edit TEXT", style="red")
            return
        if not text and self.ask is not None:
            try:
                text = self.ask(self.messages[-2]["content"]).strip()
            except (EOFError, KeyboardInterrupt):
                text = ""
        if text:
            self._answer_instead(text)

    def has_answer(self) -> bool:
        """Whether anything was answered yet; says so if not."""
        if len(self.messages) <= len(self.first):
            note("there is no answer yet", style="red")
            return False
        return True

    def _answer_instead(self, text: str) -> None:
        """Replace the last message and its answer."""
        last = self.messages[-2:]
        del self.messages[-2:]
        n_before = len(self.messages)
        try:
            self.answer(text)
        finally:  # whatever went wrong
            if len(self.messages) == n_before:
                self.messages += last

    def drop(self, argument: str) -> None:
        """Forget the first messages and their answers."""
        n_first = len(self.first)
        n_there = (len(self.messages) - n_first) // 2
        if not self.has_answer():
            return
        if argument and not argument.isdecimal():
            raise ValueError(f"/drop: expected a number of messages, got {argument!r}")
        n = min(int(argument or 1), n_there)
        del self.messages[n_first : n_first + 2 * n]
        note(f"({n_there - n} of {n_there} messages are left; they are read again with your next message)", style="dim")

    def set(self, argument: str) -> None:
        """Change how tokens are chosen, or show it."""
        name, _, value = argument.removeprefix("parameter ").partition(" ")  # as Ollama's
        if name:
            self.sampling = self.sampling.changed(name, value.strip())
        for option, is_set in asdict(self.sampling).items():
            if not name or option == sampling_field(name):
                note(f"{option.replace('_', '-')} {is_set if is_set not in (None, ()) else '(none)'}", style="dim")

    def instruct(self, text: str) -> None:
        """Begin the conversation with another system message."""
        rest = self.messages[len(self.first) :]
        self.first = [{"role": "system", "content": text}] if text else []
        self.messages = [*self.first, *rest]
        note("(the conversation is read again from its beginning with your next message)" if rest else "(noted)", "dim")

    def stats(self) -> None:
        """Show all statistics of the cache."""
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False)
        for name, value in stats_dict(self.llm.kv_stats()).items():
            shown = (
                f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
            )
            if name.endswith("_bytes"):
                shown += f"  ({value / 2**20:.1f} MiB)"
            table.add_row(name, shown)
        Console().print(table)

    def reset(self) -> None:
        """Forget all but the system message."""
        import llama_cpp

        self.messages = list(self.first)
        self.texts.clear()
        self.llm.reset()
        # reset() alone leaves the text in memory until the next question
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llm.ctx), True)
        note("(forgotten)", style="dim")

    def settings(self) -> dict[str, Any]:
        """What a saved chat depends on."""
        from ..models import sha256

        settings = {"model_id": self.model.id, "n_ctx": self.llm.n_ctx(), **self.load.kv_settings()}
        if settings["kv_compress"] is not None and settings["kv_budget"] is None:
            settings["kv_ratio"] = KVConfig(**self.load.kv_settings()).ratio(self.model.shape.n_head_kv)
        if settings.get("kv_profile") not in (None, "auto"):
            settings["kv_profile"] = sha256(Path(settings["kv_profile"]))
        return settings

    def save(self, file: Path) -> None:
        """Write the conversation and the cache."""
        from .session import save_session

        n_bytes = save_session(file, self.llm, self.settings(), self.messages)
        note(f"(saved {len(self.messages)} messages and the cache: {n_bytes / 2**20:.1f} MiB)", style="dim")

    def restore(self, file: Path) -> None:
        """Go on with a saved conversation."""
        from .session import load_session

        self.messages, different = load_session(file, self.llm, self.settings())
        self.first = [message for message in self.messages[:1] if message["role"] == "system"]
        self.texts.clear()
        note(f"(loaded {len(self.messages)} messages)", style="dim")
        for message in self.messages[len(self.first) :][-2:]:
            text = message["content"]
            note(f"{message['role']}: {text[:N_SHOWN]}{'...' if len(text) > N_SHOWN else ''}", style="dim")
        if different:
            note(f"(saved with {'; '.join(different)}: the messages are read again with your next one)", style="dim")
        else:
            note(kv_line(self.llm.kv_stats(), None), style="dim")
