"""Estimates a run's disk space, memory and seconds before anything is loaded."""
