"""What the subcommands share on the command line."""

from __future__ import annotations

from pathlib import Path

import click

setting_option = click.option(
    "--setting",
    "settings",
    multiple=True,
    help="stock:q8_0, stock:q4_0 or METHOD:RATIO[:equal][:NAME=VALUE]..., as in semanticache:0.25:type_k=f16; "
    "repeatable. stock:f16 is always there.",
)
without_base_option = click.option(
    "--without-base",
    is_flag=True,
    help="Leave stock:f16 out, since another run of the same has it: `bench report` joins them.",
)
gpu_layers_option = click.option(
    "--n-gpu-layers", type=int, default=0, show_default=True, help="Layers whose weights lie on a card, -1: all."
)
threads_option = click.option("--threads", type=click.IntRange(min=1))
json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The run's file; one that was cut off goes on.",
)


def text_option(text: str):
    """--text, a file that must be named."""
    return click.option(
        "--text", "text_path", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help=text
    )
