"""Fine-tuning: objective, optimizer, recipes, the trainer and its saved steps."""
