"""Evaluations measure an encoder: frozen features, heads, fine-tuning, dense tasks, masks against objects."""
