"""What goes to experts and back, of which a router says how much a rank keeps for its own."""

KEY = "EXPERT_MODEL_PARALLEL_GROUP/all_to_all"


def at_even_loads(sent: float, kept: float, ranks: int) -> float:
    """What ranks would have sent of these bytes, if each had kept 1 / ``ranks`` of its own.

    Args:
        sent: by all ranks that share the experts, or one in the mean.
        kept: by the same, for experts of their own.
        ranks: that share the experts.
    """
    return (sent + kept) * (ranks - 1) / ranks
