"""Benchmarks on the user's local files: one adapter a file, from a file to items, from answers to scores."""
