"""Cases drawn at random, compared with stock, and made small."""
