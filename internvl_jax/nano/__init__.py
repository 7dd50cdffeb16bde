"""nano, the small model that ships with the project: data, training, evaluation and weights."""
