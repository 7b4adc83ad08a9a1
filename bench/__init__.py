"""Benchmarks: ratios between inferq, the engine alone and a proxy without a queue, from one run."""
