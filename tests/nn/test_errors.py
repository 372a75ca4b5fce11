"""Settings that do not fit together say what to change."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.nn import ExpertChoice, TokenChoice

GOOD = {"d_model": 16, "d_ff": 64, "expansion": 2, "granularity": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": 3}, r"granularity=3 does not divide d_ff=64.*take granularity=2 or 4, or d_ff=63 or 66"),
        ({"granularity": 128}, r"does not divide d_ff=64.*take granularity=32 or 64, or d_ff=128"),
        ({"granularity": 0}, "granularity is a whole number of at least 1, not 0"),
        ({"granularity": 2.0}, "granularity is a whole number of at least 1, not 2.0"),
        ({"d_model": -16}, "d_model is a whole number of at least 1, not -16"),
        ({"d_ff": 0}, "d_ff is a whole number"),
        ({"expansion": 0}, "expansion is a whole number"),
        ({"expansion": True}, "expansion is a whole number"),
        ({"top_k": 9}, r"top_k=9 of 8 experts.*lower top_k to at most 8, or raise expansion to at least 3"),
        ({"top_k": 0}, "top_k is a whole number of at least 1, not 0"),
        (
            {"router": "sofmax"},
            "unknown router 'sofmax'; choose one of softmax, softmax_normalized, topk_softmax, sigmoid, exp",
        ),
        ({"router": 3}, r"router is a name \(softmax, .*\) or settings \(TokenChoice, ExpertChoice\), not 3"),
        ({"router": TokenChoice(score="tanh")}, "unknown score 'tanh'; choose one of softmax, sigmoid"),
        ({"router": TokenChoice(drop="random")}, "unknown drop 'random'; choose one of order, score"),
        ({"router": ExpertChoice("batch")}, "unknown group 'batch'; choose one of position, sequence, all"),
        ({"router": TokenChoice(num_groups=3)}, "num_groups=3 does not divide 8 experts; take a divisor of 8"),
        ({"router": TokenChoice(num_groups=0)}, "num_groups is a whole number of at least 1"),
        ({"router": TokenChoice(num_groups=2, top_groups=3)}, "take top_groups <= 2"),
        (
            {"router": TokenChoice(num_groups=4)},
            r"top_k=4 experts out of 1 groups of 2: raise top_groups to at least 2",
        ),
        ({"router": TokenChoice(after=True, normalize=True)}, "leave score='softmax' and normalize=False"),
        ({"router": TokenChoice(after=True, bias=True)}, "use after=False, or score='sigmoid'"),
        ({"router": "softmax_normalized", "top_k": 1}, r"the router would not learn; take router='softmax'"),
        ({"router": "sigmoid", "top_k": 1}, r"take router=TokenChoice\(score='sigmoid', after=False, normalize=False"),
        ({"activation": "swish"}, "unknown activation 'swish'; choose one of relu, relu2, gelu, gelu_tanh, silu"),
        ({"init": "xavier"}, "unknown init 'xavier'; choose one of truncated_normal, uniform"),
        ({"init_scale": 0}, "init_scale is a positive number, not 0; the paper's is 0.1"),
        ({"capacity_factor": 0}, r"capacity_factor is a positive number, such as 1.25, or None for no limit.* not 0"),
        ({"capacity_factor": float("nan")}, "capacity_factor is a positive number"),
        ({"capacity_factor": "1.0"}, "capacity_factor is a positive number"),
        ({"capacity_factor": 2.5, "router": "expert_choice"}, "take a token 1.25 times; take at most 2"),
        ({"balance_loss": -1.0}, "balance_loss is a coefficient of at least 0, not -1.0"),
        ({"z_loss": -1.0}, "z_loss is a coefficient"),
        ({"balance_loss": 0.1, "router": "expert_choice"}, "balanced by construction: leave balance_loss at 0"),
        ({"shared_experts": -1}, "shared_experts is a whole number, 0 for none, not -1"),
    ],
    ids=str,
)
def test_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moec.nn.MoE(**{**GOOD, **changes})


def test_width_of_x() -> None:
    with pytest.raises(ValueError, match=r"MoE of d_model=16: x is \(2, 8\), its last dimension must be 16"):
        moec.nn.MoE(**GOOD)(torch.randn(2, 8))


def test_what_is_just_allowed() -> None:
    moec.nn.MoE(**GOOD, top_k=8)
    moec.nn.MoE(**GOOD, router="expert_choice", capacity_factor=2.0)
    moec.nn.MoE(**GOOD, router=TokenChoice(num_groups=4, top_groups=2))
    moec.nn.MoE(**{**GOOD, "granularity": 1, "expansion": 1})
