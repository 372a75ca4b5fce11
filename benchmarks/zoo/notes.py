"""Why a family of the zoo is not rewritten whole, in words for people. `table.py` puts moec's own words beside them.

Lines are those of transformers 5.17's modeling files. A note for a family that is whole by now is not shown.
"""

from collections.abc import Mapping

_STREAMS = (
    "Every MoE layer is rewritten, in one graph. The refusals are about no MoE layer: the next layer's sum over "
    "residual streams (hyper-connections) looks like a sum over the choices of a token."
)

NOTES: Mapping[str, str] = {
    "aria": (
        "Two loops (lines 263 to 271) write each expert's rows into a slice of a new buffer, and line 356 puts "
        "the rows back in their place by `index_copy_`. moec does not know yet that a buffer written slice by "
        "slice, or row by row through a permutation, is a concatenation, or a gather by the inverse."
    ),
    "deepseek_v4": _STREAMS,
    "diffusion_gemma": (
        "Both layers are rewritten, but not in one graph. Once in each layer the cache adds the number of tokens to its "
        "`cumulative_length`. The loop over experts was traced under the assumption that every expert has tokens, and moec takes "
        "any number that changes in the loop over layers around it for one that may count these experts. It then does without "
        "the assumption, and the loop over experts breaks the graph as it does without moec."
    ),
    "doge": (
        "An expert is one row of two embeddings (lines 437 to 441), gathered for each token: its width is one, "
        "and a grouped product would do the same work in worse order. Left alone on purpose. (The layer is run "
        "alone: DogeDecoderLayer of transformers 5.17 does not unpack what it returns, so no Doge model with "
        "`is_moe=True` runs.)"
    ),
    "ernie4_5_vl_moe:vision": (
        "`moe_mm_token_type_ids.any()` (line 463) is Python control flow on data, in the family's own code: with "
        "images in the batch the graph breaks there, whatever the experts do."
    ),
    "glm5_next": _STREAMS,
    "hy_v4": (
        "Every MoE layer is rewritten, in one graph. The refusals are about no MoE layer: the choice of keys for sparse "
        "attention (line 269) looks like one of experts, the sum over residual streams (lines 659, 741) like one over choices."
    ),
    "jetmoe": (
        "The feed-forward experts and the second half of the mixture of attention heads are rewritten. Its first half (lines 300 "
        "to 325) returns one row for each slot instead of a sum over them, a form that moec does not rewrite yet."
    ),
    "longcat_flash": (
        "The loop holds experts of two kinds: those from `n_routed_experts` on are the identity (line 208). moec "
        "rolls only experts that compute the same, and refuses a loop in which they do not."
    ),
    "nllb_moe": (
        "Both layers are rewritten. Encoder and decoder break at `dropout_probability < self.layerdrop` (lines "
        "732 and 838), a branch on a random tensor, in training mode: the family's own code, which no backend can "
        "trace through."
    ),
    "switch_transformers": (
        "The router multiplies its one-hot choice by a mask of what fits into the capacity (lines 98 to 103) "
        "before the loop over experts reads it. moec knows one-hot masks, and not yet that some of their rows may "
        "have been cleared."
    ),
    "vitpose_backbone": (
        "Every expert is given every token, times a mask that compares a data set number with the expert's (lines "
        "222 to 227). The number is an input of the model: nothing is chosen by a router, and moec looks for the "
        "choices of one."
    ),
}
