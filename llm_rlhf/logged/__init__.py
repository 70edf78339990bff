"""Texts that were rewarded before, as decisions to learn from."""
