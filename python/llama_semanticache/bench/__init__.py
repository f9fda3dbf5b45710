"""Measurements that anyone can run again: `python -m llama_semanticache.bench.quality --help`."""
