"""The law is found again in runs drawn from it, intervals cover, and what cannot be told is not told."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import least_squares

from moec.cli import main
from moec.scaling import ScalingError, compute_ratio, loss, published, solver
from moec.scaling.fit import Fit, fit_runs, gain
from moec.scaling.rows import Run, measured, read_runs
from moec.scaling.solver import P
from tests.scaling.runs import drawn

E64 = published("e64")
GAIN = compute_ratio(E64, 1, 8)


def test_gamma_and_the_gain_are_recovered_and_the_intervals_cover() -> None:
    """100 times 45 runs at noise 0.003, c drawn from its prior, as the intervals take it to be (the prior is part of them)."""
    random = np.random.default_rng(0)
    names = ("alpha", "beta", "gamma", "c")
    errors, covered = [], []
    for i in range(100):
        law = replace(E64, c=random.normal(0.472, 0.2))
        fit = fit_runs(drawn(law, random), resamples=100, seed=i)
        saved = gain(fit, 1, 8)
        errors.append((fit.estimates["gamma"].value / E64.gamma - 1, saved.value / GAIN - 1))
        estimates = [(saved, GAIN)] + [(fit.estimates[n], getattr(law, n)) for n in names]
        covered.append([e.low <= truth <= e.high for e, truth in estimates])
        assert not fit.doubts
    gamma, saved_error = np.abs(np.array(errors)).T
    assert np.quantile(gamma, 0.95) < 0.10
    assert np.median(gamma) < 0.04
    assert saved_error.max() < 0.02
    shares = dict(zip(("gain", *names), np.mean(covered, axis=0)))
    assert all(0.70 <= share <= 0.90 for share in shares.values()), shares


def test_a_fit_without_noise_is_the_law() -> None:
    fit = fit_runs(drawn(E64, np.random.default_rng(0), noise=0.0), resamples=20)
    for name, estimate in fit.estimates.items():
        assert estimate.value == pytest.approx(getattr(E64, name), rel=0.02), name
    assert fit.coefficients.measured.granularity == (1, 16)


def test_the_minimum_is_that_of_scipy() -> None:
    """An independent witness: `least_squares` on the coefficients themselves, with the same priors."""
    runs = drawn(E64, np.random.default_rng(1))
    fit = fit_runs(runs, resamples=20)
    n, d, g, seen = (np.array([getattr(r, k) for r in runs]) for k in ("total_params", "tokens", "granularity", "loss"))
    noise = fit.prior.noise

    def residuals(p: np.ndarray) -> np.ndarray:
        c, log_a, h, log_b, *logs = p
        alpha, beta, gamma = np.exp(logs)
        size = np.exp(log_a) * (n / fit.design.n0) ** -alpha * (1 + h * (g**-gamma - 1))
        said = c + size + np.exp(log_b) * (d / fit.design.d0) ** -beta
        priors = [(c - 0.472) / 0.2, h / solver.SHARE_WIDTH]
        priors += list((np.array(logs) - np.log(solver.EXPONENTS)) / solver.EXPONENT_WIDTH)
        return np.concatenate([(said - seen) / noise, priors])

    start = [0.5, 0.0, 0.1, 0.0, *np.log(solver.EXPONENTS)]
    best = least_squares(residuals, start, x_scale="jac", xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=2000)
    assert fit.estimates["gamma"].value == pytest.approx(np.exp(best.x[P.log_gamma]), rel=1e-3)
    assert fit.estimates["alpha"].value == pytest.approx(np.exp(best.x[P.log_alpha]), rel=1e-3)
    assert fit.estimates["c"].value == pytest.approx(best.x[P.c], abs=1e-3)


def test_the_derivatives_are_those_of_the_prediction() -> None:
    random = np.random.default_rng(0)
    design = solver.design(random.uniform(1e6, 1e8, 9), random.uniform(1e7, 1e9, 9), random.choice([1.0, 4.0], 9))
    params = np.array([[0.5, 0.1, 0.2, -0.3, *np.log(solver.EXPONENTS)]])
    slope = solver.jacobian(design, params)
    for i in range(len(P)):
        step = np.zeros_like(params)
        step[0, i] = 1e-6
        numeric = (solver.predict(design, params + step) - solver.predict(design, params - step)) / 2e-6
        np.testing.assert_allclose(slope[..., i], numeric, rtol=1e-6, atol=1e-9)


def test_the_same_runs_give_the_same_fit() -> None:
    runs = drawn(E64, np.random.default_rng(2))
    one, two = (fit_runs(runs, resamples=30, seed=3) for _ in range(2))
    assert one.estimates == two.estimates


def test_finer_experts_may_hurt() -> None:
    """g below zero is found, not forced to nothing."""
    law = replace(E64, g=-1.0, a=20.0)
    saved = gain(fit_runs(drawn(law, np.random.default_rng(0))), 1, 8)
    assert saved.high < 1
    assert saved.low < compute_ratio(law, 1, 8) < saved.high


def test_one_run_gone_wrong_does_not_decide() -> None:
    runs = drawn(E64, np.random.default_rng(0))
    runs[7] = replace(runs[7], loss=runs[7].loss + 1.5)
    assert gain(fit_runs(runs, resamples=50), 1, 8).value == pytest.approx(GAIN, rel=0.06)


def test_branches_of_a_trunk_share_their_noise() -> None:
    """Runs of one trunk that are wrong together say less than as many independent ones."""
    random = np.random.default_rng(0)
    together = []
    for r in drawn(E64, random, noise=0.0):
        trunk = f"{r.total_params}-{r.granularity}"
        together.append(replace(r, run=trunk))
    wrong = {name: random.normal(0, 0.004) for name in sorted({r.run for r in together})}
    runs = [replace(r, loss=r.loss + wrong[r.run]) for r in together]
    alone = [replace(r, run=str(i)) for i, r in enumerate(runs)]
    shared, separate = (gain(fit_runs(x), 1, 8) for x in (runs, alone))
    assert shared.high - shared.low > 1.2 * (separate.high - separate.low)


def test_noise_between_seeds_is_measured() -> None:
    random = np.random.default_rng(0)
    runs = [replace(r, seed=str(s)) for s in range(3) for r in drawn(E64, random, noise=0.005)]
    fit = fit_runs(runs, resamples=20)
    assert fit.seed_noise == pytest.approx(0.005, rel=0.25)
    assert fit.noise == pytest.approx(0.005, rel=0.25)
    assert fit_runs(runs[:45], resamples=20).seed_noise is None


def fitted(**grid: tuple[float, ...]) -> Fit:
    return fit_runs(drawn(E64, np.random.default_rng(0), **grid), resamples=60)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "names", "reason"),
    [
        (lambda: fitted(granularities=(4,)), ("g", "gamma"), "G never varies"),
        (lambda: fitted(granularities=(1, 8)), ("g", "gamma"), "two granularities"),
        (lambda: fitted(widths=(256,)), ("a", "alpha", "g"), "N never varies"),
        (lambda: fitted(tokens=(1e9,)), ("b", "beta"), "D never varies"),
        (
            lambda: fitted(granularities=(1, 8), widths=(256, 512), tokens=(1e9,)),
            ("alpha", "gamma", "c"),
            "runs cannot tell",
        ),
        (lambda: fitted(noise=0.1), ("gamma",), "too noisy"),
    ],
)
def test_not_identifiable(make: Callable[[], Fit], names: tuple[str, ...], reason: str) -> None:
    fit = make()
    assert all(not fit.estimates[name].identifiable for name in names)
    assert any(reason in text for text in fit.doubts)


def test_a_law_without_granularity_leaves_gamma_open() -> None:
    fit = fit_runs(drawn(replace(E64, g=0.0), np.random.default_rng(0)))
    assert "gamma" in fit.estimates["gamma"].doubt
    saved = gain(fit, 1, 8)
    assert saved.low < 1 < saved.high


def test_a_gain_between_two_measured_granularities_is_identifiable() -> None:
    fit = fitted(granularities=(1, 8))
    assert gain(fit, 1, 8).identifiable
    assert gain(fit, 1, 8).value == pytest.approx(GAIN, rel=0.04)
    assert "two granularities" in gain(fit, 1, 16).doubt
    assert not gain(fitted(granularities=(4,)), 4, 8).identifiable


def test_c_known_from_its_prior_alone() -> None:
    fit = fit_runs(drawn(E64, np.random.default_rng(0), noise=0.02), prior_c=(0.472, 0.01), resamples=60)
    assert "prior alone" in fit.estimates["c"].doubt


def test_too_few_runs() -> None:
    with pytest.raises(ScalingError, match="3 runs are too few"):
        fit_runs(drawn(E64, np.random.default_rng(0))[:3])
    with pytest.raises(ScalingError, match="prior on c"):
        fit_runs(drawn(E64, np.random.default_rng(0)), prior_c=(0.4, 0.0))


HEAD = "d_model,n_blocks,expansion,granularity,tokens,loss,context\n"


def test_a_table_is_read(tmp_path: Path) -> None:
    csv, js = tmp_path / "rows.csv", tmp_path / "rows.json"
    csv.write_text(HEAD + "64,2,8,4,1e6,2.5,128\n64,2,8,2,1e6,2.6,128\n")
    js.write_text(
        json.dumps({"rows": [{"total_params": 64**2 * 68 * 2, "granularity": 4, "tokens": 1e6, "loss": 2.5}]})
    )
    one, two = read_runs(csv)
    assert (one.total_params, one.granularity, one.expansion, one.context) == (64**2 * 68 * 2, 4, 8, 128)
    assert one.run != two.run
    (bare,) = read_runs(js)
    assert (bare.total_params, bare.loss, bare.expansion) == (one.total_params, 2.5, 0)
    assert measured((one, two)).context == 128
    assert measured((bare,)).context is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no column loss, tokens, granularity"),
        ("loss,tokens\n1,2\n", "no column granularity"),
        (HEAD, "has no runs"),
        (HEAD + "64,2,8,4,,2.5,128\n", "line 2: tokens is ''"),
        (
            HEAD + "64,2,8,4,1e6,2.5,128\n64,2,8,4,1e6,nan,128\n",
            "line 3: loss is 'nan'; give a number above zero, or remove the run",
        ),
        (HEAD + "64,,8,4,1e6,2.5,128\n", "total_params is empty; fill it in, or d_model, n_blocks and expansion"),
        (HEAD + "64,2,8,4,1e6\n", "line 2 has fewer cells"),
        (HEAD + "64,2,8,4,1e6,2.5,128,9\n", "line 2 has more cells"),
        (HEAD + "64,2,8,-4,1e6,2.5,128\n", "granularity is '-4'"),
        (HEAD + "64,2,8,4,1e6,2.5,128\n64,2,16,4,1e6,2.5,128\n", "mixes expansions 8, 16"),
        ("loss\0,", "is not text"),
    ],
)
def test_a_table_with_gaps_says_where(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(ScalingError, match=reason):
        read_runs(path)


def test_json_that_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text, reason in (
        ("{", "is not JSON"),
        ('{"rows": 3}', "no list of runs"),
        ("[{}]", "run 1: total_params is empty"),
    ):
        path.write_text(text)
        with pytest.raises(ScalingError, match=reason):
            read_runs(path)


def test_one_expansion_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(HEAD + "64,2,8,4,1e6,2.5,128\n64,2,16,4,1e6,2.5,128\n")
    assert [r.expansion for r in read_runs(path, 16)] == [16]
    with pytest.raises(ScalingError, match="has no runs with expansion 4; it has 8, 16"):
        read_runs(path, 4)


def write(path: Path, runs: list[Run]) -> Path:
    columns = ("total_params", "tokens", "granularity", "loss", "run", "expansion")
    text = [",".join(columns)] + [",".join(str(getattr(r, c)) for c in columns) for r in runs]
    path.write_text("\n".join(text) + "\n")
    return path


def test_the_command_and_what_plan_makes_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = write(tmp_path / "rows.csv", drawn(E64, np.random.default_rng(0)))
    out, plot = tmp_path / "fit.json", tmp_path / "fit.png"
    assert main(["fit", str(rows), "--out", str(out), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    for part in (
        "45 runs, E = 64",
        "gamma",
        "gain 1->8",
        "every coefficient is identifiable",
        "no runs with other seeds",
    ):
        assert part in text
    assert plot.stat().st_size > 5000
    data = json.loads(out.read_text())
    assert data["estimates"]["gamma"]["low"] < 0.5843 < data["estimates"]["gamma"]["high"]
    assert main(["plan", "--flops", "1e19", "--coefficients", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["granularity"] == 16
    assert any("45" not in w and "total parameters" in w for w in found["warnings"])


def test_the_command_says_what_is_not_identifiable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "rows.csv", drawn(E64, np.random.default_rng(0), granularities=(2,)))
    assert main(["fit", str(rows)]) == 0
    assert "not identifiable: G never varies; make runs with two other granularities" in capsys.readouterr().out
    assert main(["fit", str(rows), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["estimates"]["gamma"]["identifiable"] is False
    assert data["gains"] == {}


@pytest.mark.parametrize(
    ("argv", "reason"),
    [(["--prior-c", "0.4"], "center:width"), (["--resamples", "3"], "too few"), (["--prior-c", "0.4:-1"], "width")],
)
def test_options_that_make_no_sense(
    argv: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.csv", drawn(E64, np.random.default_rng(0)))
    assert main(["fit", str(rows), *argv]) == 2
    assert reason in capsys.readouterr().err


def test_prediction_is_the_law() -> None:
    fit = fit_runs(drawn(E64, np.random.default_rng(0)), resamples=20)
    said = [float(loss(fit.coefficients, r.total_params, r.tokens, r.granularity)) for r in fit.runs]
    np.testing.assert_allclose(said, [r.loss for r in fit.runs] - fit.residuals, rtol=1e-9)
