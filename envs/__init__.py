"""Environments: construction, batched stepping with exact capture, tasks, rendering. No torch in here."""
