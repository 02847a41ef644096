"""What a checkpoint's arguments say of its model comes back, field by field, whatever it is."""

import argparse
import dataclasses
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.training import argument_utils
from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.models import gpt

from megatron_helix import pretrain_gpt
from megatron_helix.experiment import runs
from megatron_helix.inference import run_fields, saved_model
from megatron_helix.inference.run_fields import RUN_FIELDS
from megatron_helix.launching import launchers
from megatron_helix.options import arguments
from tests.experiment_case import experiment

SIZES = (
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--seq-length", "32", "--max-position-embeddings", "64", "--micro-batch-size", "1"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "300"),
)
ON_A_CPU = ["--micro-batch-size", "1", *arguments.complete(["--helix-device", "cpu"], 1)]

# Together they set every flag that makes a model, each what can stand beside the others.
MODELS = {
    "attention": (
        *("--group-query-attention", "--num-query-groups", "2", "--kv-channels", "24"),
        *("--qk-layernorm", "--attention-output-gate", "--softmax-type", "learnable"),
        *("--disable-bias-linear", "--add-qkv-bias", "--swiglu", "--ffn-hidden-size", "160"),
        *("--normalization", "RMSNorm", "--norm-epsilon", "1e-3", "--apply-layernorm-1p"),
        *("--window-size", "6,0", "--window-attn-skip-freq", "[1,0]"),
        *("--untie-embeddings-and-output-weights", "--apply-residual-connection-post-layernorm"),
        *("--make-vocab-size-divisible-by", "16", "--null-tokenizer-eod-id", "7"),
        *("--null-tokenizer-pad-id", "3", "--attention-softmax-in-fp32", "--init-method-std", "1"),
        *("--embedding-init-method-std", "0.3", "--bf16", "--fp32-residual-connection"),
    ),
    "rope": (
        *("--position-embedding-type", "rope", "--rotary-base", "500", "--rotary-percent", "0.5"),
        *("--rotary-interleaved", "--rotary-seq-len-interpolation-factor", "2", "--qk-l2-norm"),
        *("--use-rope-scaling", "--rope-scaling-factor", "4", "--no-rope-freq", "[0,1]"),
        *("--rope-type", "rope", "--squared-relu", "--fp16", "--apply-query-key-layer-scaling"),
    ),
    "rope by its old flag": ("--use-rotary-position-embeddings", "--window-size=-1,0"),
    "yarn": (
        *("--position-embedding-type", "yarn", "--yarn-original-max-position-embeddings", "16"),
        *("--yarn-beta-fast", "20", "--yarn-beta-slow", "2", "--rotary-scaling-factor", "4"),
        *("--no-yarn-correction-range-round-to-int", "--mscale", "0.7", "--mscale-all-dim", "0.5"),
        *("--quick-geglu", "--glu-linear-offset", "1", "--activation-func-clamp-value", "7"),
    ),
    "mup": (
        *("--use-mup", "--mup-base-hidden-size", "32", "--mup-embedding-mult", "2"),
        *("--mup-output-mult", "3", "--mup-base-head-dim", "8", "--mup-attn-scale-power", "0.5"),
        *("--mup-width-mult", "2", "--no-pad-vocab-size", "--no-bias-gelu-fusion"),
    ),
    "experts": (
        *("--num-experts", "4", "--moe-layer-freq", "[0,1]", "--moe-ffn-hidden-size", "96"),
        *("--moe-router-num-groups", "2", "--moe-router-group-topk", "1", "--moe-router-topk", "2"),
        *("--moe-router-pre-softmax", "--moe-router-topk-scaling-factor", "2.5"),
        *("--moe-router-score-function", "sigmoid", "--moe-router-dtype", "fp32"),
        *("--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", "0.01"),
        *("--moe-shared-expert-intermediate-size", "64", "--moe-shared-expert-gate"),
        *("--moe-router-load-balancing-type", "seq_aux_loss", "--moe-latent-size", "32"),
        "--disable-bias-linear",
    ),
    "one expert": (
        *("--num-experts", "4", "--moe-router-topk", "1", "--moe-apply-probs-on-input"),
        *("--moe-router-load-balancing-type", "aux_loss", "none", "--moe-aux-loss-coeff", "1", "2"),
        *("--moe-expert-capacity-factor", "2", "--moe-token-drop-policy", "position"),
        *("--moe-router-force-load-balancing", "--moe-router-force-biased", "0.5"),
        *("--moe-router-quantile-balancing-ema", "0.5", "--moe-router-pre-softmax"),
        "--disable-bias-linear",
    ),
    "multi-latent": (
        *("--multi-latent-attention", "--q-lora-rank", "32", "--kv-lora-rank", "16"),
        *("--qk-head-dim", "16", "--qk-pos-emb-head-dim", "8", "--v-head-dim", "12"),
        *("--position-embedding-type", "mrope", "--mrope-section", "2", "3", "3"),
    ),
    "tokenizer": (
        *("--tokenizer-model", "m", "--vocab-file", "v", "--merge-file", "f"),
        *("--tokenizer-metadata", "x", "--tokenizer-special-tokens", "<a>", "<b>"),
        *("--tiktoken-pattern", "v2", "--tiktoken-num-special-tokens", "9"),
        *("--tokenizer-sentencepiece-legacy", "--chat-template", "{{ two  words }}"),
        *("--no-tokenizer-sentencepiece-ignore-extra-whitespaces", "--trust-remote-code"),
        *("--tokenizer-hf-no-use-fast", "--tokenizer-hf-no-include-special-tokens"),
        *("--sft-tokenizer-prompt-format", "default"),
        *("--spec", "megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec"),
    ),
    "hybrid": (
        *("--hybrid-layer-pattern", "M*", "--is-hybrid-model", "--mamba-head-dim", "8"),
        *("--mamba-num-groups", "2", "--mamba-num-heads", "4", "--mamba-state-dim", "16"),
        *("--mamba-training-ssm-states-dtype", "bf16"),
    ),
    "linear attention": (
        *("--experimental-attention-variant", "gated_delta_net", "--linear-attention-freq", "2"),
        *("--linear-conv-kernel-dim", "3", "--linear-key-head-dim", "16"),
        *("--linear-value-head-dim", "16", "--linear-num-key-heads", "2"),
        *("--linear-num-value-heads", "4"),
    ),
    "sparse attention": (
        *("--experimental-attention-variant", "dsa", "--multi-latent-attention"),
        *("--dsa-indexer-n-heads", "2", "--dsa-indexer-head-dim", "8", "--dsa-indexer-topk", "4"),
        *("--dsa-indexer-topk-freq", "2", "--dsa-indexer-skip-topk-offset", "1"),
        *("--dsa-indexer-rope-interleaved", "--no-dsa-indexer-rotate-activation"),
        *("--no-dsa-indexer-scoring-relu", "--dsa-indexer-k-norm-epsilon", "1e-3"),
        *("--dsa-indexer-k-norm-fp32", "--disable-bias-linear"),
    ),
}
# Files that say what a model is, beside the arguments; refused.
ELSEWHERE = {
    *("yaml_cfg", "heterogeneous_layers_config_path"),
    "heterogeneous_layers_config_encoded_json",
}
# Kernels of experts that a CPU has not.
GPU_ONLY = {"moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"}
LAYOUTS = {
    "the same": (1, ()),
    "another": (
        8,
        (
            *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
            *("--pipeline-model-parallel-size", "2", "--attention-dropout", "0"),
        ),
    ),
}


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron's arguments of a run with these flags."""

    def validate(flags: Any, provider: Any = None, world_size: int = 1) -> argparse.Namespace:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setattr(sys, "argv", ["train", *ON_A_CPU, *flags])
        return validate_args(parse_args(provider or pretrain_gpt.flags_beside()))

    return validate


@pytest.fixture(scope="module")
def of_training() -> dict[str, argparse.Namespace]:
    """Filled as it is asked."""
    return {}


@pytest.fixture
def saved(of_training: dict[str, argparse.Namespace], validated: Any, name: str) -> Any:
    """The arguments of the model of this name, as training saves them."""
    if name not in of_training:
        of_training[name] = validated([*SIZES, *MODELS[name]])
    return of_training[name]


def _differing(one: Any, other: Any) -> set[str]:
    """Names of what two configs do not have in common."""
    assert type(one) is type(other)
    assert vars(one).keys() == vars(other).keys()
    drawn = {"init_method", "output_layer_init_method", "embedding_init_method"}  # by their std
    hooks = {"pre_wrap_hooks", "post_wrap_hooks", "transformer"}
    names = vars(one).keys() - drawn - hooks
    return {name for name in names if getattr(one, name) != getattr(other, name)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_field_by_field(saved: Any, validated: Any, layout: str) -> None:
    expected = argument_utils.gpt_config_from_args(saved)
    world_size, flags = LAYOUTS[layout]
    args = validated(flags, saved_model.on_top_of(saved, flags), world_size)
    found = saved_model.config_of(args, saved)
    assert _differing(found, expected) == set()
    differing = _differing(found.transformer, expected.transformer)
    assert differing <= RUN_FIELDS
    assert bool(differing) == bool(flags)  # what is of the run is this run's


def test_the_models_set_every_flag_of_a_model() -> None:
    """What is added to Megatron and is not of the run has to be added here."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    wanted = {action.dest for action in parser._actions} & saved_model.read_by_megatron()
    wanted -= RUN_FIELDS | ELSEWHERE | GPU_ONLY
    for flags in MODELS.values():
        args = vars(parser.parse_args(flags))
        wanted -= {name for name in wanted if args[name] != parser.get_default(name)}
    sizes = vars(parser.parse_args(SIZES))
    assert {name for name in wanted if sizes[name] == parser.get_default(name)} == set()


@pytest.mark.parametrize("name", MODELS)
def test_flags_say_the_same(saved: Any) -> None:
    """Layouts are checked by them."""
    model = saved_model.of_model(saved)
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    said = vars(parser.parse_args(saved_model.as_flags(model)))
    for name in model.keys() & said.keys():
        if isinstance(model[name], torch.dtype):
            continue  # of Mamba; no flag says torch's names
        alone = model[name] if isinstance(model[name], list) else [model[name]]
        assert said[name] == (alone if isinstance(said[name], list) else model[name]), name


def test_what_is_of_the_run_is_known_to_megatron() -> None:
    assert saved_model.read_by_megatron() >= RUN_FIELDS
    groups = [value for name, value in vars(run_fields).items() if isinstance(value, tuple)]
    counts = Counter(name for group in groups for name in group)
    assert [name for name, count in counts.items() if count > 1] == []
    assert counts.keys() == RUN_FIELDS


def test_what_a_later_megatron_adds_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(kw_only=True)
    class Later(gpt.GPTModelConfig):
        a_new_field: int = 0

    monkeypatch.setattr(gpt, "GPTModelConfig", Later)
    monkeypatch.setattr(argument_utils, "gpt_config_from_args", lambda args: args.a_new_flag)
    saved = argparse.Namespace(a_new_field=1, a_new_flag=2, lr=3, tensor_model_parallel_size=4)
    assert saved_model.of_model(saved) == {"a_new_field": 1, "a_new_flag": 2}


def test_names_of_earlier_versions_are_known() -> None:
    saved = argparse.Namespace(norm_epsilon=1e-6, apply_layernorm_1p=True)
    expected = {"layernorm_epsilon": 1e-6, "layernorm_zero_centered_gamma": True}
    assert saved_model.of_model(saved) == expected


def test_what_megatrons_own_flag_leaves_out_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "generating.md").read_text()
    named = re.findall(r"`(--[a-z0-9-]+)`", page.partition("In 0.19 it leaves out")[2])
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    left_out = {parser._option_string_actions[flag].dest for flag in named}
    taken = {word for word in load_args_from_checkpoint.__code__.co_consts if isinstance(word, str)}
    assert len(named) == len(left_out) == 20
    assert "swiglu" in taken
    assert not left_out & taken
    assert left_out <= saved_model.read_by_megatron() - RUN_FIELDS


def test_an_experiments_flags_of_the_model_are_in_its_initial_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There decode runs read what they serve; what is of a run is given to the runs alone."""
    model = ["--window-size=(4,0)", "--qk-layernorm", "--rotary-percent=0.5"]
    given = ["--window-size", "4,0", "--qk-layernorm", "--rotary-percent", "0.5"]
    of_the_run = ["--recompute-activations", "--attention-backend", "unfused", "--lr", "1"]
    launched: list[list[str]] = []
    monkeypatch.setattr(launchers, "launch", lambda how, flags, *args: launched.append(flags))
    small = experiment(flags=[*given, *of_the_run])
    runs.initial_weights(small, small.models[0], tmp_path / "data", tmp_path)
    plain = experiment()
    runs.initial_weights(plain, plain.models[0], tmp_path / "data", tmp_path)
    assert sorted(word for word in launched[0] if word not in launched[1]) == sorted(model)


def test_every_field_of_a_configs_model_is_in_its_flags() -> None:
    """But for its name, what a reader is told, and a vocabulary that runs have of their bytes."""
    small = experiment().models[0].model_copy(update={"num_experts": 4, "moe_router_topk": 1})
    others = {"swiglu": True, "position_embedding_type": "none", "num_query_groups": 2}
    others |= dict.fromkeys(type(small).model_fields.keys() - others.keys(), 12)
    same = [
        name
        for name, value in others.items()
        if small.model_copy(update={name: value}).flags() == small.flags()
    ]
    assert sorted(same) == ["departures", "name", "vocab_size"]


def test_a_value_that_no_flag_sets_comes_back(validated: Any) -> None:
    """An entry point of one's own may put fields of the config among the arguments."""
    saved = validated(SIZES)
    saved.softmax_scale = 0.25
    args = validated([], saved_model.on_top_of(saved, []))
    assert saved_model.config_of(args, saved).transformer.softmax_scale == 0.25


@pytest.mark.parametrize(
    ("flags", "dtype"), [((), torch.float16), (("--bf16",), torch.bfloat16)], ids=["its", "given"]
)
def test_precision_is_the_models_unless_given(validated: Any, flags: Any, dtype: Any) -> None:
    saved = validated([*SIZES, "--fp16"])
    args = validated(flags, saved_model.on_top_of(saved, flags))
    assert args.params_dtype == args.params_dtype == dtype
    assert args.fp16 == (dtype == torch.float16)


@pytest.mark.parametrize("trained", ["erf", "tanh by fusion", "tanh by TransformerEngine"])
def test_gelu_is_the_function_of_training(validated: Any, trained: str) -> None:
    """Fused, it is another: the difference is a thousand times what rounding makes."""
    saved = validated(SIZES)
    saved.bias_gelu_fusion = trained == "tanh by fusion"
    saved.use_te_activation_func = trained == "tanh by TransformerEngine"
    args = validated([], saved_model.on_top_of(saved, []))
    transformer = saved_model.config_of(args, saved).transformer
    assert not transformer.bias_activation_fusion
    assert not transformer.use_te_activation_func
    x = torch.linspace(-4, 4, 101)
    erf = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    tanh = x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))  # Megatron's
    assert (erf - tanh).abs().max() > 1e-4
    expected = erf if trained == "erf" else tanh
    assert (transformer.activation_func(x) - expected).abs().max() < 1e-6
