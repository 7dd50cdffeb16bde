"""A model beside the PyTorch implementation, stage by stage."""
