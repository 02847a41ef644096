"""Which layout, and what it will do, before a GPU is rented: arithmetic only, no process group."""
