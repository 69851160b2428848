"""Tuning: masks, offsets and predictors trained through the model."""
