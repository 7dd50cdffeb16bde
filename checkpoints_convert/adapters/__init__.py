"""Adapters in peft's layout, in and out."""
