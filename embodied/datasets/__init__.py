"""Readers of recorded robot data; all of them give lists of `Episode`."""
