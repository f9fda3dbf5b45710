"""The command line program llama-semanticache."""

from __future__ import annotations

import click

from .. import __version__
from .bench import bench
from .chat import chat
from .common import ErrorGroup
from .memory import memory
from .models import models
from .profile import profile
from .run import run
from .serve import serve


@click.group(cls=ErrorGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llama-semanticache")
def main() -> None:
    """Language models in less memory: llama.cpp with a compressed KV cache.

    MODEL is the path of a GGUF file, a name that 'llama-semanticache models' lists, or owner/repo[:quant] of Hugging
    Face; a named model is downloaded on first use.
    """


for command in (chat, run, serve, profile, memory, models, bench):
    main.add_command(command)
