"""Sentence embeddings over HTTP: concurrent requests share batches, a bounded queue says when it is full."""
