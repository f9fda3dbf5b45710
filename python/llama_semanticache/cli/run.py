"""llama-semanticache run: one answer."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import SemanticCacheError
from .answer import Answer, TokenMeter, explain, reading, stream_answer
from .common import (
    LoadOptions,
    SamplingOptions,
    in_options,
    json_option,
    kv_line,
    llama_options,
    load_llama,
    model_argument,
    note,
    sampling_options,
    stats_dict,
)

if TYPE_CHECKING:
    from ..llama import Llama

EXIT_INTERRUPTED = 130


@click.command()
@model_argument
@click.argument("question", required=False, metavar="[PROMPT]")
@click.option("--prompt", help="The prompt.")
@click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Text that comes before the prompt; repeatable.",
)
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="File with the prompt; - is stdin.",
)
@click.option("--system", help="System message.")
@click.option("--raw", is_flag=True, help="Continue the text of the prompt, without the model's chat template.")
@sampling_options
@json_option
@llama_options
def run(
    model: str,
    question: str | None,
    prompt: str | None,
    files: tuple[str, ...],
    prompt_file: str | None,
    system: str | None,
    raw: bool,
    sampling: SamplingOptions,
    as_json: bool,
    load: LoadOptions,
) -> None:
    """Print MODEL's answer to one prompt.

    A text comes before the prompt, from --file, --prompt-file or a pipe:

        llama-semanticache run MODEL --file book.txt "Who is the author?"

        llama-semanticache run MODEL "Who is the author?" < book.txt
    """
    stdin = question == "-"
    if question is not None and not stdin:
        if prompt is not None:
            raise click.UsageError(f"expected one prompt, got {question!r} and --prompt; leave out one of them")
        prompt = question
    if raw and system:
        raise click.UsageError("--system needs a chat template; leave out --raw or put the text into the prompt")
    text = _prompt(stdin, prompt, prompt_file, files)
    llm, model_file = load_llama(model, load)
    answer = Answer()
    meter = TokenMeter(llm)
    try:
        with meter, reading(llm):
            usage = _answer(llm, text, system, raw, sampling, as_json, answer)
    except SemanticCacheError:
        raise
    except (ValueError, RuntimeError) as error:
        if load.verbose:
            raise
        raise click.ClickException(in_options(explain(error))) from error
    if as_json:
        result = {
            "model": str(model_file.path),
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            **usage,
            "prefill_s": meter.prefill_s,
            "prefill_tps": usage["prompt_tokens"] / meter.prefill_s if meter.prefill_s else None,
            "decode_s": meter.decode_s,
            "decode_tps": meter.tokens_per_s,
            "kv": stats_dict(llm.kv_stats()),
        }
        click.echo(json.dumps(result, ensure_ascii=False, indent=2))
        return
    if not answer.text.endswith("\n"):
        click.echo()
    if answer.interrupted:
        note("(stopped)", style="dim")
        sys.exit(EXIT_INTERRUPTED)
    note(kv_line(llm.kv_stats(), meter.tokens_per_s), style="dim")


def _prompt(stdin: bool, prompt: str | None, prompt_file: str | None, files: tuple[str, ...]) -> str:
    """The text to answer, from wherever the user gave it. Raises click.UsageError if there is none."""
    if stdin and prompt_file:
        raise click.UsageError("expected one text, got - and --prompt-file; leave out one of them")
    if stdin or (prompt_file is None and not files and (_is_piped() if prompt else not sys.stdin.isatty())):
        prompt_file = "-"
    parts = []
    for file in [*files, *([prompt_file] if prompt_file is not None else [])]:
        try:
            # bytes, so that the encoding is UTF-8 everywhere
            data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            parts.append(data.decode("utf-8").replace("\r\n", "\n").removesuffix("\n"))
        except (OSError, UnicodeDecodeError) as error:
            name = "stdin" if file == "-" else file
            raise click.ClickException(
                f"{name}: expected a text in UTF-8, got: {error}; convert it, for example with iconv"
            ) from error
    if prompt is not None:
        parts.append(prompt)
    text = "\n\n".join(part for part in parts if part)
    if not text:
        raise click.UsageError(
            "expected a prompt, got none; put it behind MODEL, or give --prompt-file or text on stdin; to talk: "
            "llama-semanticache chat MODEL"
        )
    return text


def _is_piped() -> bool:
    """Whether stdin is a pipe or a file, and not a terminal or nothing."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # of no file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _answer(
    llm: Llama, text: str, system: str | None, raw: bool, sampling: SamplingOptions, as_json: bool, answer: Answer
) -> dict[str, int]:
    """Generate into `answer`: with as_json quietly and with the token counts as the result, else to stdout."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    complete: Any = llm.create_completion if raw else llm.create_chat_completion
    prompt = text if raw else messages
    if not as_json:
        stream_answer(complete(prompt, stream=True, **sampling.arguments()), answer)
        return {}
    try:
        reply = complete(prompt, **sampling.arguments())
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    choice = reply["choices"][0]
    answer.text = choice["text"] if raw else choice["message"]["content"] or ""
    answer.finish_reason = choice["finish_reason"]
    return {name: reply["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
