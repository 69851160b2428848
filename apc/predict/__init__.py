"""Predictors: from an FFN's input to its cluster, or its neurons."""
