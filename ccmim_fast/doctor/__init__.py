"""This machine: what it has for training, tried, and how to get what is missing."""
