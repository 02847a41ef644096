"""What training moves through memory beside the layers: gradients added up, and the optimizer.

Bytes a parameter, counted from the passes of megatron-core 0.19 over its buffers, each of which
reads or writes every element from or to memory. ``e`` is the width of weights, ``g`` of gradients:

========================================================  ==========  =============================
pass                                                      bytes       over
========================================================  ==========  =============================
every micro-batch: ``main_grad.add_(grad)``               e + 2 g      what a rank computes
                                                                      gradients for
the same of a gathered weight, from m parts               m e + 2 g    its shard
the same of one kept for a step, by its GEMM              2 g          the whole weight
``zero_grad_buffer``                                      g           what it holds
``grad_data *= 1 / data-parallel size``                   2 g         the same, beside replicas
gradients widened to fp32 (fp16)                          g + 4       its share of the optimizer
unscale and look for overflow (fp16)                      8           the same
norm                                                      4           the same
clip                                                      8           the same
Adam reads gradient, weight and moments, writes three     28          the same
fp32 weights copied into those of the model (half)        4 + e       the same
========================================================  ==========  =============================

With FSDP a gradient is not added to a buffer of the whole: it is copied into the one that it is
scattered from (e + s, of the width ``s`` that is sent), and the shard is added (s + 2 g). Torch
FSDP2 copies what it has gathered out of the flat buffer, too, in both passes (4 e). Nothing is
averaged or zeroed in memory, and a gradient in half precision is widened.

The first is of runs with ``--no-gradient-accumulation-fusion``, as experiments set it: the fused
GEMM needs apex.
"""

from megatron_helix.planner import model_ends, parameters
from megatron_helix.planner.deployment import Deployment

FP32 = 4


def accumulation_bytes(here: Deployment, stage: int) -> float:
    """Of the gradients of one micro-batch; weights gathered for a step have them whole."""
    width, sums = here.element_bytes, 2 * here.gradient_bytes
    if here.layout.fsdp:
        reads = 5 if here.layout.fsdp == "torch_fsdp2" else 1
        whole, shard = sum(parameters.held(here, stage)), parameters.kept(here, stage)
        sent = here.sent_gradient_bytes
        return (reads * width + sent) * whole + (sent + sums) * shard
    added = sum(parameters.held(here, stage)) * (width + sums)
    others = here.cut.m - 1
    gathered = [(plan, parameters.layer_matrices(here) * of) for plan, of in here.plans]
    if (plan := model_ends.table_plan(here)) is not None:
        gathered.append((plan, model_ends.gathered_parameters(here, stage)))
    for plan, matrices in gathered:
        if plan.keeps_gradients:
            added += matrices * (others * sums - width)
        elif plan.exchange == "weights":
            added += matrices * others * width
    return added


def optimizer_bytes(here: Deployment, stage: int) -> float:
    """Of one step's end: gradients zeroed, averaged, unscaled and clipped, weights updated."""
    width = here.gradient_bytes
    averaged = 2 * width if here.batch_ranks * here.layout.cp > 1 else 0
    every = 0 if here.layout.fsdp else (width + averaged) * sum(parameters.held(here, stage))
    share = 4 + 8 + 28
    if here.element_bytes < FP32:
        share += FP32 + here.element_bytes
    if width < FP32:
        share += width + FP32
    if here.precision == "fp16":
        share += 8
    return every + share * parameters.optimized(here, stage)
