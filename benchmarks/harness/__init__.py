"""The model-level harness: contenders in processes of their own, timed in alternating rounds."""
