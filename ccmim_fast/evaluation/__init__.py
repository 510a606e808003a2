"""Evaluations of an encoder: frozen features, heads, fine-tuning, dense tasks, and how masks fall on objects."""
