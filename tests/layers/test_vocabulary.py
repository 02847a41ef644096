"""Embedding and LM head in the block's own token order, on four ranks, against a model on one.

Losses and the gradients of embedding, head and last norm, in double precision.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_helix.exchange.strategy import Choice
from megatron_helix.layers import vocabulary
from megatron_helix.layers.weight_forms import finish_step
from tests import block_case
from tests.block_case import Block
from tests.covering import covering
from tests.distributed import model_parallel, run_distributed

S, B = 8, 4
BLOCK = Block(dtype=torch.float64, rope=True)
HEAD, TABLE, NORM = (
    "output_layer.weight",
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
)


def _model(
    groups: ProcessGroupCollection,
    layout,
    tied: bool,
    vocab: int,
    split: str = "batch",
    gather: str = "microbatch",
) -> GPTModel:
    torch.manual_seed(1)  # the first weights are then the same for every layout
    choice = Choice(exchange="weights", split=split, gather=gather)
    config, spec = block_case.describe(BLOCK, groups, layout, choice)
    model = GPTModel(
        config,
        spec,
        vocab_size=vocab,
        max_sequence_length=S,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
        pg_collection=groups,
    )
    return model.double()


def _losses(model: GPTModel, vocab: int) -> torch.Tensor:
    """Losses ``[2, b, s]`` of a step's micro-batches, whose gradients weigh each differently."""
    draw = torch.Generator().manual_seed(1)
    positions = torch.arange(S).expand(B, S)
    every = []
    for _ in range(2):
        tokens, labels = (torch.randint(vocab, (B, S), generator=draw) for _ in range(2))
        losses = model(tokens, positions, None, labels=labels)
        losses.backward(torch.randn(B, S, generator=draw, dtype=losses.dtype))
        every.append(losses.detach())
    finish_step([model])
    return torch.stack(every)


def compare(m: int, n: int, split: str, gather: str, tied: bool, vocab: int) -> tuple[bool, dict]:
    """Whether the block's order was kept beyond its ends; (expected, actual) by what it is."""
    with model_parallel(tp=4):
        rank = dist.get_rank()
        alone = [dist.new_group([other]) for other in range(4)][rank]
        one = ProcessGroupCollection(tp=alone, cp=alone, pp=alone, embd=alone)
        four = ProcessGroupCollection.use_mpu_process_groups()
        layout = BLOCK.layout(m, n)
        whole = _model(one, None, tied, vocab)
        part = _model(four, layout, tied, vocab, split, gather)
        vocabulary.extend([part])
        results = {"losses": (_losses(whole, vocab), _losses(part, vocab))}
        for name in (TABLE, NORM) if tied else (TABLE, HEAD, NORM):
            expected, actual = (model.get_parameter(name).grad for model in (whole, part))
            if name == NORM:
                dist.all_reduce(actual)  # as Megatron does for weights that see some of the tokens
            else:
                expected = expected.chunk(4)[rank]
            results[name] = expected, actual
        ends = part.helix_vocabulary.ends
        assert ends.entered == ends.stays
    return ends.stays, results


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("m", "n", "split", "gather", "vocab", "moves"),
    [
        (2, 2, "batch", "microbatch", S * B, True),
        (4, 1, "batch", "step", S * B // 2, True),
        # As many tokens as a head group has: not fewer bytes.
        (2, 2, "batch", "microbatch", 2 * S * B, False),
        (4, 1, "batch", "microbatch", S * B, False),
        (2, 2, "sequence", "step", 2 * S * B, True),
        (4, 1, "sequence", "microbatch", S * B, True),
        (2, 2, "sequence", "microbatch", S * B, True),
        (2, 2, "sequence", "step", S * B, True),
        (4, 1, "sequence", "once", S * B // 2, True),
    ],
)
def test_losses_and_gradients_are_those_of_one_rank(
    m: int, n: int, split: str, gather: str, vocab: int, moves: bool, tied: bool
) -> None:
    ranks = run_distributed(compare, 4, m, n, split, gather, tied, vocab)
    for rank, (stayed, results) in enumerate(ranks):
        assert stayed == moves
        for name, (expected, actual) in results.items():
            assert actual.shape == expected.shape, name
            error = (actual - expected).abs().max() / expected.abs().max()
            # As in test_layer_gradients.py, with embedding, head and cross entropy on top; those
            # and rotary frequencies Megatron computes in single precision.
            tolerance = 200 * torch.finfo(torch.float32).eps
            assert error <= tolerance, f"rank {rank}, {name}: off by {error:.1e} of its largest"


# Who looks into the stream: whether it still enters, and whether it stays in, the block's order.
LOOKS = {
    "labels by position": (True, True),
    "at the logits": (True, False),
    "at the hidden states": (True, False),
    "at the embeddings": (False, True),
    "with hidden states of one's own": (False, True),
    "in a log of what goes in and out": (False, False),
}


def look(model: GPTModel, how: str, folder: Path) -> torch.Tensor:
    """What is seen of a training micro-batch."""
    draw = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(S * B, (B, S), generator=draw) for _ in range(2))
    stream = torch.randn(S, B, BLOCK.hidden, generator=draw, dtype=BLOCK.dtype)
    inputs: list[Any] = [tokens, torch.arange(S).expand(B, S), None]
    asked: dict[str, Any] = {"labels": labels}
    seen: list[torch.Tensor] = []
    group = model.pg_collection.tp
    if how == "labels by position":
        inputs, asked = [*inputs, None, labels], {}
    elif how == "at the logits":
        model.output_layer.register_forward_hook(lambda head, given, out: seen.append(out[0]))
    elif how == "at the embeddings":
        model.embedding.register_forward_hook(lambda embedding, given, out: seen.append(out))
    elif how == "at the hidden states":
        asked["output_processor"] = lambda hidden_states, **_: hidden_states
    elif how == "with hidden states of one's own":
        asked["decoder_input"] = stream.chunk(group.size())[group.rank()]
    else:
        model.config.config_logger_dir = str(folder / f"{group.size()} {dist.get_rank()}")
    output = model(*inputs, **asked)
    return (seen or [output])[0].detach()


def stock_and_helix(
    how: str, split: str, folder: Path
) -> tuple[tuple[bool, bool], torch.Tensor, torch.Tensor]:
    """Which ends kept the block's order; what one rank with all sees of my part, and what I see."""
    with model_parallel(tp=4):
        alone = [dist.new_group([other]) for other in range(4)][dist.get_rank()]
        one = ProcessGroupCollection(tp=alone, cp=alone, pp=alone, embd=alone)
        four = ProcessGroupCollection.use_mpu_process_groups()
        whole = _model(one, None, True, S * B)
        part = _model(four, BLOCK.layout(2, 2), True, S * B, split)
        vocabulary.extend([part])
        expected, actual = (look(model, how, folder) for model in (whole, part))
        if how.startswith("at the"):
            expected = expected.chunk(4, -1 if "logits" in how else 0)[dist.get_rank()]
        ends = part.helix_vocabulary.ends
    return (ends.entered, ends.stays), expected, actual


@pytest.mark.parametrize(("how", "split"), covering(product(LOOKS, ["batch", "sequence"])))
def test_who_looks_into_the_stream_sees_stocks(how: str, split: str, tmp_path: Path) -> None:
    for ends, expected, actual in run_distributed(stock_and_helix, 4, how, split, tmp_path):
        assert ends == LOOKS[how]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def kinds_of_gradients(deterministic: bool) -> set[str]:
    """The autograd functions behind a training micro-batch."""
    with model_parallel(tp=4):
        four = ProcessGroupCollection.use_mpu_process_groups()
        model = _model(four, BLOCK.layout(2, 2), True, S * B)
        model.embedding.word_embeddings.deterministic_mode = deterministic
        vocabulary.extend([model])
        tokens = torch.zeros(B, S, dtype=torch.long)
        losses = model(tokens, torch.arange(S).expand(B, S), None, labels=tokens)
        assert model.helix_vocabulary.ends.entered
        found, left = set(), {losses.grad_fn}
        while left:
            node = left.pop()
            found.add(node)
            left |= {other for other, _ in node.next_functions if other} - found
    return {node.name() for node in found}


def test_deterministic_mode_looks_words_up_as_stock_does() -> None:
    for names in run_distributed(kinds_of_gradients, 4, True):
        assert "EmbeddingBackward0" not in names
    for names in run_distributed(kinds_of_gradients, 4, False):
        assert "EmbeddingBackward0" in names
