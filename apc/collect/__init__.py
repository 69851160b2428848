"""Activation patterns of a model: read off its forward pass, stored, and handed to training."""
