"""One training run: strict configuration, run folder, checkpoints, metrics, progress, comparison.

This room knows no algorithm and no body. Import what you need from its modules; nothing is imported here, so
that `import experiment` costs nothing.
"""
