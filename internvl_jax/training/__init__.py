"""Fine-tuning: data, objective, optimizer, adapters, recipes and the loop around them."""
