"""An experiment file, its runs, and what they measured."""
