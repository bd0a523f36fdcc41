"""Packed tokens and ops: the part that runs an `EncoderSpec`, whatever the architecture it came from."""
