"""Language models: tasks, generation, rewards, and the recipes that train and evaluate them."""
