"""Clusters activation patterns: seeding, the LightningModules of the algorithms, and the codebook they produce."""
