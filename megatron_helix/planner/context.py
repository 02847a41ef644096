"""Context parallelism: how ranks come by each other's keys and values, in TransformerEngine.

* p2p: they visit every rank in a ring, backward with their gradients.
* all_gather: they are gathered, again for the backward pass, and their gradients scattered.
* a2a: queries, keys and values are traded for all tokens of 1/cp of the heads, and the context
  back; backward the same the other way.

Read in ``transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py``; counted
on no machine. Sizes on a rank, with its N tokens: keys and values ``N K d / T`` each, queries and
context ``N H d / T``.
"""

from megatron_helix.planner.book import Book


def parallel(book: Book) -> None:
    """What moves over the context-parallel ranks in every layer."""
    here, layout, model = book.here, book.here.layout, book.here.model
    kind, layers = layout.cp_comm_type or "p2p", here.layers
    channels = here.tokens * model.kv_channels / here.tp
    both = 2 * here.groups * channels
    if kind == "p2p":
        hops = (layout.cp - 1) * layers
        book.call("keys and values", "cp", "send", "forward", both, hops, beside="keys")
        book.call("keys and values", "cp", "send", "backward", 2 * both, hops, beside="keys")
    elif kind == "all_gather":
        for when in ("forward", "backward"):
            book.call("keys and values", "cp", "all_gather", when, both / 2, 2 * layers)
        book.call("keys and values", "cp", "reduce_scatter", "backward", both / 2, 2 * layers)
    else:
        for when in ("forward", "backward"):
            heads = model.num_attention_heads * channels
            book.call("queries, context", "cp", "all_to_all", when, heads, 2 * layers)
            book.call("keys and values", "cp", "all_to_all", when, both / 2, 2 * layers)
