"""Measurements that anyone can run again, each a subcommand of `llama-semanticache bench`.

quality  facts asked for after compression, KL divergence on the text that follows
tasks    LongBench-style tasks from a file
chat     facts of a conversation's first turns, asked for in its last
speed    prefill and decode against stock llama.cpp, runs interleaved
memory   bytes allocated and resident
report   tables and plots of the runs in a folder

A run is a JSON file (`runs`) that goes on where it stopped; a cache is named by a setting (`settings`).
"""
