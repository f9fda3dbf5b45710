"""llama-semanticache profile: measure how a model's rows are shared out among its heads."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import click

from ..models import cache_dir, open_model
from ..profile import N_TEXT_TOKENS, calibrate, find, read_texts
from .common import json_option, model_argument, note, traceback_option


@click.command()
@model_argument
@click.option(
    "--out", type=click.Path(dir_okay=False, writable=True), help="File to write.  [default: the user's cache]"
)
@click.option("--force", is_flag=True, help="Measure again even if a profile is there.")
@click.option(
    "--text",
    "texts",
    type=click.Path(exists=True, dir_okay=False),
    multiple=True,
    help="Text to measure with; repeatable.  [default: prose, code, a chat and other languages]",
)
@click.option(
    "--n-ctx", type=click.IntRange(min=1024), default=N_TEXT_TOKENS, show_default=True, help="Tokens of each text."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: llama.cpp's choice]")
@json_option
@traceback_option
def profile(
    model: str, out: str | None, force: bool, texts: tuple[str, ...], n_ctx: int, threads: int | None, as_json: bool
) -> None:
    """Measure the budget of each head of MODEL and store it.

    chat and run do this by themselves on first use (--kv-profile auto), but for models of fewer than 8 compressed KV
    heads: these get equal budgets unless a profile is named.
    """
    model_file = open_model(model, progress=not as_json)
    if out and Path(out).exists() and not force:
        raise click.ClickException(f"expected the name of a new file, got {out}, which is there; --force replaces it")
    own_measure = bool(texts) or n_ctx != N_TEXT_TOKENS
    there = None if force else find(model_file)
    if there and own_measure and not out:
        raise click.ClickException(
            f"expected a model that was not measured before, got one with {there}; --force replaces it, --out FILE "
            "writes another"
        )
    if there and not own_measure:
        came = "measured before" if there.is_relative_to(cache_dir()) else "came with the package"
        note(f"{came}; --force measures it again")
        if out:
            shutil.copyfile(there, out)
            there = Path(out)
    begin = time.perf_counter()
    file = (not own_measure and there) or calibrate(
        model_file,
        texts=read_texts(texts) if texts else None,
        n_ctx=n_ctx,
        out=out,
        force=force,
        progress=not as_json,
        n_threads=threads,
    )
    seconds = time.perf_counter() - begin
    if as_json:
        result = {"model": str(model_file.path), "model_id": model_file.id, "profile": str(file), "seconds": seconds}
        click.echo(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        click.echo(file)
