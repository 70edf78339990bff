"""Measuring language policies: win rates, frontiers, diversity, perplexity, benchmarks, red teams."""
