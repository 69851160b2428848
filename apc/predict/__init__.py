"""Predictors: from an FFN's input to a token's cluster, or to its neurons."""
