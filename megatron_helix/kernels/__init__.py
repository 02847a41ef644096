"""Operations without a layout: collectives with gradients, copies, sums, attention."""
