"""What the recipes that learn from comparisons and thumbs share."""
