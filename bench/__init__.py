"""Benchmarks: each op as a fraction of what the machine can do, beside its peers."""
