"""Robot learning: policies, demonstrations, rollouts, training recipes, evaluation."""
