"""What the recipes that sample and learn from it share."""
