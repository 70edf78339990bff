"""What language models are trained on: texts to imitate, prompts to answer, and how answers are judged."""
