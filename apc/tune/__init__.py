"""Tuning of masks and predictors through the model."""
