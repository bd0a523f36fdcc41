"""Races between ways to run a model: each in a process of its own, checked against fp64, timed in alternating rounds."""
