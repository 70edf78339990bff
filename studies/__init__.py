"""Studies: commands that measure what the README claims. Each cell leaves one JSON under results/."""
