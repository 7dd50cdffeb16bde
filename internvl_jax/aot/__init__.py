"""Ahead-of-time compilation for TPU topologies: memory, FLOPs, collectives and rooflines without a TPU."""
