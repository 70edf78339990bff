"""Policies of a robot: each judges decisions for the core and acts for a rollout."""
