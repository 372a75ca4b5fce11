"""The page that `moec advise` writes: Markdown of one screen, and its picture."""

from __future__ import annotations

from moec.scaling.advise import Advice
from moec.scaling.device import Device
from moec.scaling.fit import Estimate
from moec.scaling.limits import device_doubts, doubts
from moec.scaling.render import count, duration


def page(advice: Advice, device: Device | None, picture: str) -> str:
    """Markdown. `picture` is the file name of the plot, "" for none."""
    found, fit, verdict = advice.plan, advice.fit, advice.verdict
    parts = [
        f"# Granularity: {verdict.decision}",
        "",
        *(f"{text[0].upper()}{text[1:]}." for text in verdict.reasons),
        "",
        f"Best of those trained: **G = {found.granularity:g}** at E = {found.expansion:g}, d_model about {found.d_model:.0f}, "
        f"{count(found.total_params)} parameters ({count(found.active_params)} active), loss {found.loss:.3f}.",
        "",
        f"Tokens needed: **{count(found.tokens)}** (80 %: {count(advice.tokens.low)}..{count(advice.tokens.high)}), "
        f"{found.flops:.3g} FLOPs{_time(found.seconds)}.{_bound(found.bound_by)}",
        "",
        *_grains(advice),
        "",
        *_machine(advice, device),
        "",
        "## What would change it",
        "",
        *(f"- {text}" for text in verdict.changes or ("nothing that was looked at",)),
        "",
        "## What it rests on",
        "",
        f"- {len(fit.runs)} runs, {fit.noise:.4f} nats around the fitted curve"
        + ("" if fit.seed_noise is None else f", {fit.seed_noise:.4f} between seeds"),
        *(f"- not identifiable: {text}" for text in fit.doubts),
        *(f"- {text}" for text in doubts(found, fit.coefficients)),
        *(f"- {text}" for text in (device_doubts(found, device) if device else ())),
    ]
    return "\n".join([*parts, *(["", f"![]({picture})"] if picture else [])]) + "\n"


def _grains(advice: Advice) -> list[str]:
    coarsest = min(advice.best_share)
    charged = "measured time" if advice.steps else "routing"
    lines = [
        f"| G | compute that G = {coarsest:g} would need, routing free | the same, {charged} charged | best in |",
        "|---|---|---|---|",
        f"| {coarsest:g} | 1 | 1 | {advice.best_share[coarsest]:.0%} of resamples |",
    ]
    return lines + [
        f"| {g:g} | {_cell(advice.gain[g])} | {_cell(advice.worth[g])} | {advice.best_share[g]:.0%} |"
        for g in advice.worth
    ]


def _machine(advice: Advice, device: Device | None) -> list[str]:
    if device is None:
        return ["Slowdown: not measured. `python -m moec.scaling.measure` writes a table for `--device`."]
    lines = [
        f"Measured on {device.machine}, a whole model of this width:",
        "",
        "| G | a token takes longer by | may take | |",
    ]
    return [
        *lines,
        "|---|---|---|---|",
        *(
            f"| {s.before:g} to {s.after:g} | {s.slowdown:+.1%} | {s.allowed:+.1%} | {'pays' if s.pays else 'does not pay'} |"
            for s in advice.steps
        ),
    ]


def _cell(e: Estimate) -> str:
    return f"{e.value:.3f} ({e.low:.3f}..{e.high:.3f})" + ("" if e.identifiable else ", not identifiable")


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f", {duration(seconds)} on this machine"


def _bound(limits: tuple[str, ...]) -> str:
    return f" Held back by {' and '.join(limits)}." if limits else ""
