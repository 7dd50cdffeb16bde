"""Fine-tuning: conversations about images become batches, batches become a trained checkpoint."""
