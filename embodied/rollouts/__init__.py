"""Playing with state policies: worker processes, and what they saw as a Rollout."""
