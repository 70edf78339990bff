"""Logged episodes and one's own as transitions, and what the recipes that learn from them share."""
