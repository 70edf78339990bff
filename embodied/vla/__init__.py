"""What learns to act from images and words: workers that play chunks, judging, credit, the eyes' teaching."""
