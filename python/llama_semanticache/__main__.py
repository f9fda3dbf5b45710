"""python -m llama_semanticache: the command line program."""

from .cli import main

main(prog_name="llama-semanticache")
