"""What takes the place of stock's modules, and ``helixify``, which puts it there."""
