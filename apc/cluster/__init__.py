"""Clusters of activation patterns: the LightningModules, where they begin, and the codebook that they leave."""
