"""Other libraries' algorithms behind the same data, evaluation, run folder and logging."""
