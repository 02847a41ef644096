"""What works of mixtures of experts."""

from megatron_helix.options.features.rows import Works

_DRAWN = "tests/fuzz/test_slice.py::test_helix_gives_stocks_numbers"
_FEATURES = "tests/test_features.py::test_a_feature_of_megatron_gives_the_same_numbers"

EXPERTS = (
    Works(
        feature="Experts",
        names="--moe-router-topk --moe-ffn-hidden-size --moe-token-dispatcher-type",
        test=_DRAWN,
        examples=(
            "--moe-token-dispatcher-type allgather",
            "--moe-router-topk 1 --moe-router-pre-softmax",
            "--moe-token-dispatcher-type alltoall",
            "--moe-ffn-hidden-size 48",
        ),
        needs=("moe",),
    ),
    Works(
        feature="Dense and MoE layers in one model",
        names="--moe-layer-freq",
        test=_FEATURES,
        examples=("--num-layers 2 --moe-layer-freq [0,1]",),
        needs=("moe",),
    ),
    Works(
        feature="Shared experts",
        names="--moe-shared-expert-intermediate-size --moe-shared-expert-gate"
        " --moe-shared-expert-overlap",
        test=_FEATURES,
        examples=(
            "--moe-shared-expert-intermediate-size 48",
            "--moe-shared-expert-intermediate-size 48 --moe-shared-expert-gate",
            "--moe-shared-expert-intermediate-size 48 --moe-shared-expert-overlap"
            " --moe-token-dispatcher-type alltoall",
        ),
        needs=("moe",),
    ),
    Works(
        feature="MoE balancing",
        names="--moe-router-load-balancing-type --moe-aux-loss-coeff --moe-z-loss-coeff"
        " --moe-router-quantile-balancing-ema moe_grad_scale_func",
        test=_DRAWN,
        examples=(
            "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1",
            "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.1",
            "--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.1",
            "--moe-router-load-balancing-type quantile_balancing"
            " --moe-router-quantile-balancing-ema 0.5 --num-experts 4 --moe-router-topk 2",
            "--moe-z-loss-coeff 0.01",
        ),
        needs=("moe",),
        note="seq_aux_loss keeps stock's token order",
    ),
    Works(
        feature="Sinkhorn routing",
        names="",
        test="tests/test_token_order.py::test_sinkhorn_balances_the_tokens_of_a_rank",
        examples=("--moe-router-load-balancing-type sinkhorn --moe-router-topk 1",),
        # It balances the tokens of a rank: stock's own sizes differ from each other.
        needs=("moe", "sp", "same size"),
        note="keeps stock's token order",
    ),
    Works(
        feature="Routing",
        names="--moe-router-score-function --moe-router-pre-softmax --moe-router-dtype"
        " --moe-router-topk-scaling-factor --moe-router-num-groups --moe-router-group-topk"
        " --moe-router-enable-expert-bias --moe-router-bias-update-rate"
        " --moe-apply-probs-on-input moe_router_topk_limited_devices",
        test=_DRAWN,
        examples=(
            "--moe-router-score-function sigmoid",
            "--moe-router-score-function sqrtsoftplus",
            "--moe-router-pre-softmax --moe-router-topk-scaling-factor 2.5",
            "--moe-router-dtype fp64",
            "--moe-router-num-groups 2 --moe-router-group-topk 1 --moe-router-topk 2",
            "--moe-router-score-function sigmoid --moe-router-enable-expert-bias"
            " --moe-router-bias-update-rate 0.01",
            "--moe-router-topk 1 --moe-router-pre-softmax --moe-apply-probs-on-input",
        ),
        needs=("moe",),
    ),
    Works(
        feature="Expert capacity, dropped tokens",
        names="--moe-expert-capacity-factor --moe-token-drop-policy"
        " --moe-pad-expert-input-to-capacity moe_token_dropping",
        test="tests/test_token_order.py::test_tokens_are_dropped_as_stock_drops_them",
        examples=(
            "--moe-expert-capacity-factor 0.75 --moe-token-dispatcher-type alltoall",
            "--moe-expert-capacity-factor 0.5 --moe-token-drop-policy position"
            " --moe-pad-expert-input-to-capacity --moe-token-dispatcher-type alltoall",
        ),
        # An expert's share is of a rank's tokens: stock's own sizes differ from each other.
        needs=("moe", "sp", "same size"),
        note="keeps stock's token order",
    ),
    Works(
        feature="Noise on the input of routers",
        names="--moe-input-jitter-eps",
        test="tests/test_dropout_training.py::test_copies_of_other_models_stay_copies",
        note="drawn for a rank's tokens, and in evaluation too, as in stock",
    ),
    Works(
        feature="Squared ReLU weighted by probabilities",
        names="--use-fused-weighted-squared-relu",
        test=_DRAWN,
        examples=("--squared-relu --use-fused-weighted-squared-relu --disable-bias-linear",),
        needs=("moe",),
    ),
)
