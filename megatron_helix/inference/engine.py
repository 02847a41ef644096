"""Prefill and decode of a static batch, on Megatron's static inference context.

As Megatron's own static engine does it: the prompts are prefilled up to the length of the shortest,
then every step is one token of each sequence, given by the prompt where that is longer. All
sequences have the same positions, so no mask is needed, and a sequence's tokens do not depend on
the others.

What Megatron's engine refuses is here: sequence parallelism in the prefill (without it the
``weights`` exchange has nothing to stand on), and a batch in several micro-batches, which keep the
stages of a pipeline busy at once.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode

Sample = Callable[[torch.Tensor], torch.Tensor]

# What Megatron's modules call their part in sequence parallelism. Its own function that sets them
# (``set_model_to_sequence_parallel``) does not know which were off before, and finds a model again
# by an ``id`` that another one may have by then.
SEQUENCE_PARALLEL = (
    *("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings"),
)


@dataclass(kw_only=True)
class MicroBatch:
    """Some sequences of the batch, which go through the model together.

    Attributes:
        tokens: ``[b, total]``: prompts, and behind them what has been generated.
        lengths: ``[b]``, of the prompts.
        context: Megatron's, with this rank's part of the KV cache.
        end: positions that hold a token of every sequence.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    context: StaticInferenceContext
    end: int

    def append(self, sampled: torch.Tensor) -> None:
        """The tokens at ``end``: sampled ones ``[b]``, but where a prompt goes on, its own."""
        given = self.lengths > self.end
        self.tokens[:, self.end] = torch.where(given, self.tokens[:, self.end], sampled)
        self.end += 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token of each sequence of a micro-batch, as it comes out.

    Attributes:
        microbatch: which one, from 0.
        tokens: ``[b]``, at the new position; prompts that go on there included.
        position: of the new tokens; the shortest prompt's length in the prefill's step.
        logits: ``[b, V]`` they were drawn from; None but on the last pipeline stage.
        time_s: when they were known, by ``time.perf_counter``.
    """

    microbatch: int
    tokens: torch.Tensor
    position: int
    logits: torch.Tensor | None
    time_s: float


def micro_batches(
    prompts: Sequence[Sequence[int]], new_tokens: int, *, count: int, size: int
) -> list[MicroBatch]:
    """The prompts in ``count`` micro-batches, with room for ``new_tokens`` behind the longest.

    Args:
        prompts: token ids.
        new_tokens: tokens to generate for each.
        count: divides the number of prompts.
        size: T; the cache's positions are rounded up to a multiple of it.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    total = int(lengths.max()) + new_tokens
    tokens = torch.zeros(len(prompts), total, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    capacity = -(-total // size) * size
    return [
        MicroBatch(
            tokens=part.cuda(),
            lengths=part_lengths.cuda(),
            context=StaticInferenceContext(len(part), capacity),
            end=int(lengths.min()),
        )
        for part, part_lengths in zip(tokens.chunk(count), lengths.chunk(count), strict=True)
    ]


def cache_bytes(parts: Sequence[MicroBatch]) -> int:
    """Bytes of keys and values that this rank holds, counted on the live tensors."""
    return sum(
        tensor.numel() * tensor.element_size()
        for part in parts
        for key, value, *_ in part.context.key_value_memory_dict.values()
        for tensor in (key, value)
    )


class Engine:
    """Runs micro-batches through one pipeline stage of a model.

    Args:
        model: this rank's stage, not wrapped; put into evaluation mode.
        sample: draws tokens from logits; the same on every rank.
        live: whether the model is trained on. What Megatron keeps of a pass, rotary frequencies for
            instance, must then not be of ``inference_mode``, whose tensors no backward pass takes.
    """

    def __init__(self, model: Any, sample: Sample, *, live: bool = False):
        self.model, self.sample, self.live = model.eval(), sample, live
        self.config = model.config
        self.tp_size, self.pp = model.pg_collection.tp.size(), model.pg_collection.pp
        self.stages = dist.get_process_group_ranks(self.pp)
        self.first, self.last = self.pp.rank() == 0, self.pp.rank() == self.pp.size() - 1
        self.cut = [
            (module, name)
            for module in (self.config, *model.modules())
            for name in SEQUENCE_PARALLEL
            if getattr(module, name, False) is True
        ]

    def prefill(self, parts: Sequence[MicroBatch]) -> Iterator[Step]:
        """The first step of every micro-batch. Arguments and results as for :meth:`decode`."""
        return self._run(parts, 1, lambda: False)

    def decode(
        self, parts: Sequence[MicroBatch], done: Callable[[], bool] = lambda: False
    ) -> Iterator[Step]:
        """The steps that are left, after :meth:`prefill`.

        Several stages work on different micro-batches at once. A step comes out on the ranks of the
        last stage, and on those of the first one when it has come back there; the ranks between
        them get none.

        Args:
            parts: of equal shapes.
            done: asked after every step of a model without pipeline: whether all have ended.
        """
        yield from self._run(parts, parts[0].tokens.size(1) - parts[0].end, done)

    def _run(
        self, parts: Sequence[MicroBatch], steps: int, done: Callable[[], bool]
    ) -> Iterator[Step]:
        items = [k for _ in range(steps) for k in range(len(parts))]
        # The first stage takes tokens back this many micro-batches behind its forward, before it
        # sends: sends and receives then have one order on all stages, and none waits in a ring.
        lag = min(self.pp.size(), len(parts)) - 1
        for number, k in enumerate(items):
            output = self._forward(parts[k])
            if self.last:
                tokens = self.sample(output)
                if not self.first:
                    dist.send(tokens, self.stages[0], group=self.pp)
                yield self._step(parts, k, tokens, output)
                if self.first and done():
                    return
                continue
            if self.first and lag and number >= lag:
                yield self._receive(parts, items[number - lag])
            dist.send(output, self.stages[self.pp.rank() + 1], group=self.pp)
            if self.first and not lag:
                yield self._receive(parts, k)
            if not self.first:
                parts[k].end += 1
        if self.first and not self.last:
            for k in items[len(items) - lag :]:
                yield self._receive(parts, k)

    def _receive(self, parts: Sequence[MicroBatch], k: int) -> Step:
        tokens = torch.empty_like(parts[k].lengths)
        dist.recv(tokens, self.stages[-1], group=self.pp)
        return self._step(parts, k, tokens, None)

    def _step(
        self,
        parts: Sequence[MicroBatch],
        k: int,
        tokens: torch.Tensor,
        logits: torch.Tensor | None,
    ) -> Step:
        part = parts[k]
        part.append(tokens)
        now = part.tokens[:, part.end - 1].cpu()  # waits for the device: the time is the token's
        return Step(
            microbatch=k,
            tokens=now,
            position=part.end - 1,
            logits=logits,
            time_s=time.perf_counter(),
        )

    @contextlib.contextmanager
    def _whole_stream(self) -> Iterator[None]:
        """Without sequence parallelism: a step's one token cannot be cut."""
        for module, name in self.cut:
            setattr(module, name, False)
        try:
            yield
        finally:
            for module, name in self.cut:
                setattr(module, name, True)

    def _forward(self, part: MicroBatch) -> torch.Tensor:
        """Prefill or one step: logits ``[b, V]`` on the last stage, else the stream."""
        start = part.context.sequence_len_offset
        length = part.end - start
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad() if self.live else torch.inference_mode())
            stack.enter_context(InferenceMode.active())
            if start:
                stack.enter_context(self._whole_stream())
            else:  # causal: what stands behind the prompt changes nothing before it
                length = -(-length // self.tp_size) * self.tp_size
            return self._pass(part, start, length)

    def _pass(self, part: MicroBatch, start: int, length: int) -> torch.Tensor:
        """``length`` positions from ``start`` on."""
        tokens = part.tokens[:, start : start + length]
        tokens = torch.nn.functional.pad(tokens, (0, length - tokens.size(1)))
        position_ids = torch.arange(start, start + length, device=tokens.device)
        position_ids = position_ids.clamp(max=part.tokens.size(1) - 1).expand_as(tokens)
        rows = length // self.tp_size if self.config.sequence_parallel else length
        if not self.first:
            shape = (rows, len(tokens), self.config.hidden_size)
            stream = torch.empty(shape, dtype=self.config.pipeline_dtype, device=tokens.device)
            dist.recv(stream, self.stages[self.pp.rank() - 1], group=self.pp)
            self.model.set_input_tensor(stream)
        output = self.model(
            tokens,
            position_ids,
            None,
            inference_context=part.context,
            runtime_gather_output=True,
            output_processor=_logits,
            output_processor_context=part.end - 1 - start,
        )
        # The prompt's end, not that of what was prefilled: the next token takes its place there.
        part.context.sequence_len_offset = part.end
        if part.end >= int(part.lengths.max()):
            part.context.enable_decode_mode()
        return output.contiguous()


def _logits(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    scale_logits: Callable[[torch.Tensor], torch.Tensor],
    context: int,
    **_: Any,
) -> torch.Tensor:
    """Logits ``[b, V]`` of the token at ``context``; an ``output_processor`` of ``GPTModel``.

    Under sequence parallelism a rank's stream is a chunk of the sequence, and the LM head gathers
    one row of each rank: the one that is wanted is its chunk's.
    """
    rows = hidden_states.size(0)
    row = hidden_states[context % rows].unsqueeze(0)
    logits, _bias = output_layer(row, weight=output_weight, runtime_gather_output=True)
    return scale_logits(logits)[context // rows]
