"""What a layout must be, before a run and after: expected, and checked."""
