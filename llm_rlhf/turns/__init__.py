"""Answers of several turns: who is talked to, how they are written, what they become."""
