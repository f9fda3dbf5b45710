"""llama-semanticache models: models that are known by name, and those that were fetched."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from .. import hub
from ..errors import ModelFileError
from ..models import default_name, find, is_fetched, manifest, resolve
from .common import json_option, model_argument, note, traceback_option


@click.group(invoke_without_command=True)
@json_option
@traceback_option
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List, fetch and remove models. A model is named as `list` shows it, or owner/repo[:quant] as on Hugging Face."""
    if ctx.invoked_subcommand is None:
        _list(as_json)


@models.command("list")
@json_option
@traceback_option
def list_models(as_json: bool) -> None:
    """List the models that can be given by name."""
    _list(as_json)


def _list(as_json: bool) -> None:
    entries = [
        {
            **asdict(entry),
            "default": entry.name == default_name(),
            "path": str(entry.path),
            "fetched": is_fetched(entry),
        }
        for entry in manifest().values()
    ]
    files = {str(file.name): file for file in reversed(hub.fetched())}.values()  # the newest of a name
    if as_json:
        entries += [
            {"name": str(file.name), "size_bytes": file.size_bytes, "path": str(file.path), "fetched": True}
            for file in files
        ]
        click.echo(json.dumps(entries, ensure_ascii=False, indent=2))
        return
    for entry in entries:
        where = f"in {entry['path']}" if entry["fetched"] else "not fetched yet"
        size = entry["size_bytes"] / 2**20
        click.echo(f"{entry['name']}: {entry['description']}; {size:.0f} MiB, {entry['licence']}; {where}")
    for file in files:
        click.echo(f"{file.name}: from Hugging Face; {file.size_bytes / 2**20:.0f} MiB; in {file.path}")


@models.command()
@model_argument
@json_option
@traceback_option
def pull(model: str, as_json: bool) -> None:
    """Download MODEL, unless it is there, and print its path."""
    name = hub.parse(model)
    if name is None and Path(model).is_file():
        raise ModelFileError(f"expected the name of a model to fetch, got a file that is there: {model}")
    path = hub.fetch(name, update=True) if name else resolve(model, progress=not as_json)
    click.echo(json.dumps({"name": model, "path": str(path)}, ensure_ascii=False) if as_json else path)


@models.command()
@model_argument
@traceback_option
def rm(model: str) -> None:
    """Delete a MODEL that was fetched."""
    if name := hub.parse(model):
        n_bytes = hub.remove(name)
    else:
        path = find(model).path
        if not path.is_file():
            raise ModelFileError(f"expected a model that was fetched, got {model}; see 'llama-semanticache models'")
        n_bytes = path.stat().st_size
        path.unlink()
    note(f"{n_bytes / 2**20:.0f} MiB are free again")
