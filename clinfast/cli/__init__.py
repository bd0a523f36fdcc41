"""What the command `clinfast` does; its options are in `clinfast_command`, which needs no torch."""
