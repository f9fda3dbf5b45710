"""llama-semanticache models: models that are known by name."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from ..models import default_name, find, is_fetched, manifest, resolve
from .common import json_option, traceback_option


@click.group(invoke_without_command=True)
@json_option
@traceback_option
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the models that can be given by name."""
    if ctx.invoked_subcommand is not None:
        return
    entries = [
        {
            **asdict(entry),
            "default": entry.name == default_name(),
            "path": str(entry.path),
            "fetched": is_fetched(entry),
        }
        for entry in manifest().values()
    ]
    if as_json:
        click.echo(json.dumps(entries, ensure_ascii=False, indent=2))
        return
    for entry in entries:
        where = f"in {entry['path']}" if entry["fetched"] else "not fetched yet"
        size = entry["size_bytes"] / 2**20
        click.echo(f"{entry['name']}: {entry['description']}; {size:.0f} MiB, {entry['licence']}; {where}")


@models.command()
@click.argument("name")
@json_option
@traceback_option
def fetch(name: str, as_json: bool) -> None:
    """Download the model NAME, unless it is there, and print its path."""
    find(name)  # a path is no name
    path = resolve(name, progress=not as_json)
    click.echo(json.dumps({"name": name, "path": str(path)}, ensure_ascii=False) if as_json else path)
