"""Measurements that anyone can run again: `llama-semanticache bench speed`, `python -m llama_semanticache.bench.quality`."""
