"""Collects activation patterns from a model, stores them, and feeds them to training."""
