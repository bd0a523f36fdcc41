"""Races between ways to run a model: processes of their own, outputs checked against fp64, alternating rounds."""
