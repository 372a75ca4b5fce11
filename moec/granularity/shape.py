"""The sizes of one MoE layer, and every granularity that follows from them.

    shape = ExpertShape(d_model=2048, d_expert=1024, num_experts=64, top_k=8)      # OLMoE
    shape.granularity, shape.granularity_el, shape.granularity_sonic               # 8.0, 4.0, 2.0

The word means different numbers in different papers, so the sizes are stored and each number is derived.
D model width, F width of one expert, E experts, K experts per token, d_ff width of the dense block that was cut into experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from moec.errors import GranularityError


@dataclass(frozen=True)
class ExpertShape:
    """One MoE layer.

    d_model      width of the model, D
    d_expert     width of one expert, F
    num_experts  routed experts, E
    top_k        experts per token, K; None where nobody says (expert choice: give the average)
    shared       width of all shared experts together; 0: none
    gated        whether an expert has three matrices (act(gate(x)) * up(x)) instead of two
    d_ff         width of the dense block that the experts replace; None: 4 * d_model, as in the paper

    Raises GranularityError, which says what to change.
    """

    d_model: int
    d_expert: int
    num_experts: int
    top_k: int | None
    shared: int = 0
    gated: bool = True
    d_ff: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if field.name == "gated" or (size is None and field.name in ("top_k", "d_ff")):
                continue
            least = 0 if field.name == "shared" else 1
            if isinstance(size, bool) or not isinstance(size, int) or size < least:
                raise GranularityError(f"{field.name} is a whole number of at least {least}, not {size!r}")
        if self.top_k is not None and self.top_k > self.num_experts:
            raise GranularityError(
                f"top_k={self.top_k} of num_experts={self.num_experts}: a token cannot visit more experts than there are; "
                f"lower top_k to at most {self.num_experts}"
            )

    @staticmethod
    def of_granularity(
        d_model: int,
        d_ff: int,
        expansion: int,
        granularity: int,
        top_k: int | None = None,
        shared: int = 0,
        gated: bool = False,
    ) -> ExpertShape:
        """The paper's layer: expansion * G experts of width d_ff / G, G of them per token unless `top_k` says otherwise.

        Raises GranularityError if G does not divide d_ff.
        """
        if granularity < 1 or d_ff % granularity:
            near = [g for g in range(1, d_ff + 1) if d_ff % g == 0]
            good = ", ".join(map(str, sorted(sorted(near, key=lambda g: abs(g - granularity))[:3])))
            raise GranularityError(
                f"granularity={granularity} does not divide d_ff={d_ff}; the nearest that do are {good}, or take a d_ff that is "
                f"a multiple of {max(granularity, 1)}"
            )
        k = granularity if top_k is None else top_k
        return ExpertShape(d_model, d_ff // granularity, expansion * granularity, k, shared, gated, d_ff)

    @property
    def granularity(self) -> float:
        """G = d_ff / d_expert, with d_ff = 4 * d_model unless given (Krajewski et al., arXiv 2402.07871, section 4)."""
        return (self.d_ff or 4 * self.d_model) / self.d_expert

    @property
    def granularity_el(self) -> float:
        """2 * d_model / d_expert (Efficiency Leverage, arXiv 2507.17702)."""
        return 2 * self.d_model / self.d_expert

    @property
    def granularity_sonic(self) -> float:
        """d_model / d_expert (SonicMoE, arXiv 2512.14080)."""
        return self.d_model / self.d_expert

    @property
    def granularity_matched(self) -> float:
        """(8/3) * d_model / d_expert: d_ff of the gated dense block with as many parameters as an ungated one of 4 * d_model."""
        return 8 * self.d_model / (3 * self.d_expert)

    @property
    def active_width(self) -> float:
        """Width that a token visits, shared experts included, over d_model: the paper's recipe keeps it at 4."""
        return (self._k() * self.d_expert + self.shared) / self.d_model

    @property
    def activation_ratio(self) -> float:
        """K / E, shared experts left out."""
        return self._k() / self.num_experts

    @property
    def expansion_rate(self) -> float:
        """Width of all routed experts over d_ff (= 4 * d_model unless given): the paper's E = N_MoE / N_ff."""
        return self.num_experts * self.d_expert / (self.d_ff or 4 * self.d_model)

    def _k(self) -> int:
        if self.top_k is None:
            raise GranularityError(
                "top_k is not known; give the number of experts that a token visits (on average) as top_k="
            )
        return self.top_k
