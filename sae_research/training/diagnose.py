"""What a training run's curves and held-out metrics show to be wrong, with the parameter to change.

Every rule is a function of metrics that the report holds, every limit stands in `LIMITS`. A run of minutes breaks some
of them rightly: it is short. Nothing here changes a run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import accumulate
from statistics import mean, median
from typing import Any, NamedTuple

from sae_research.config.recipes import SAERecipe


class Limits(NamedTuple):
    """Where a metric becomes a finding. Set on SAEs of the packaged model trained at learning rates from 1e-5 to 0.1
    (docs/training.md has the measurements)."""

    l0_low: float = 0.005
    """L0 below this share of d_in: too sparse to reconstruct from."""
    l0_high: float = 0.25
    """L0 above this share of d_in: hardly sparse."""
    l0_off: float = 1.5
    """L0 this many times off the k or target that was asked for, either way."""
    dead: float = 0.05
    """Fraction of latents silent for the last `DEAD_TOKENS` training tokens, or half the run if that is shorter."""
    dense: float = 0.5
    """Share of L0 that comes from latents firing on more than `DENSE_FROM` of held-out tokens."""
    still_falling: float = 0.05
    """Fall of the loss, as a share of it, from 40 % of the run to the beginning of the decay."""
    rising: float = 0.05
    """Rise of the loss before the decay above its lowest stretch so far."""
    spike: float = 1.5
    """A row of the curve this many times the median of its neighbours."""
    collapse: float = 0.5
    """Fall of variance explained below its best so far."""
    decay_drop: float = 0.10
    """Fall of the loss while the learning rate decays ..."""
    decay_ratio: float = 5.0
    """... where that is this many times the fall before it: the rate was too high for the loss to settle."""
    narrow_l0: float = 0.10
    """L0 of at least this share of d_in ..."""
    narrow_variance: float = 0.60
    """... that explains less than this: the dictionary lacks directions."""
    narrow_width: float = 16.0
    """No dictionary this many times wider than d_in is called narrow."""
    chance: float = 0.70
    """Cross-entropy of the language model on the text, as a share of a uniform guess's: it does not know this text."""
    suspicious: float = 0.45
    """The same share from which on the model is asked about another text for comparison."""
    text_gap: float = 1.0
    """Nats by which cross-entropy on the text exceeds that on the packaged text."""


LIMITS = Limits()
DEAD_TOKENS = 100_000
DENSE_FROM = 0.2
MIN_ROWS = 12
"""Rows a curve needs before its shape says anything."""


class CurvePoint(NamedTuple):
    """One row of a training curve."""

    progress: float
    """Fraction of the run done."""
    loss: float
    variance_explained: float


class TrainingSummary(NamedTuple):
    """What is known of one SAE once it is trained."""

    config: SAERecipe
    curve: Sequence[CurvePoint]
    d_in: int
    l0: float
    variance_explained: float
    fraction_silent: float
    """Of latents, over the last `DEAD_TOKENS` tokens or half of the run."""
    dense_share: float
    """Share of L0 from latents that fire on more than `DENSE_FROM` of the tokens."""
    pca: dict[int, float]
    """Variance explained by so many principal components at the same hook."""
    decay_fraction: float
    sparsity_warmup_fraction: float
    """While a penalty comes in, the loss may rise."""


class Finding(NamedTuple):
    """One thing that is wrong."""

    what: str
    """l0_too_high, l0_too_low, l0_off_target, dead_latents, dense_latents, learning_rate_too_low,
    learning_rate_too_high, too_narrow or wrong_text."""
    says: str
    figure: str
    """What `value` is."""
    value: float
    limit: float
    change: str
    """The parameter and which way."""


def diagnose(name: str, summary: TrainingSummary, limits: Limits = LIMITS) -> list[Finding]:
    """Everything that is wrong with one SAE, the gravest kind of fault first."""
    place = f"train.saes.{name}"
    found = [*_sparsity(place, summary, limits), *_learning_rate(place, summary, limits), *_latents(place, summary, limits)]
    if not any(finding.what == "learning_rate_too_low" for finding in found):
        found += _width(place, summary, limits)
    return found


def diagnose_text(
    ce: float, ce_elsewhere: float | None, vocab_size: int, dataset: str, limits: Limits = LIMITS
) -> list[Finding]:
    """Whether the language model knows the text at all. ce: its cross-entropy on held-out documents of the text, in
    nats a token; ce_elsewhere: on the packaged text, where that was measured."""
    uniform = math.log(vocab_size)
    if ce > limits.chance * uniform:
        return [
            Finding(
                "wrong_text",
                f"the language model predicts {dataset} barely better than chance",
                "cross-entropy as a share of a uniform guess's",
                ce / uniform,
                limits.chance,
                "text.dataset: text of the language and kind that the model was trained on",
            )
        ]
    if ce_elsewhere is not None and ce - ce_elsewhere > limits.text_gap:
        return [
            Finding(
                "wrong_text",
                f"the language model predicts {dataset} far worse than the packaged text "
                f"({ce:.2f} against {ce_elsewhere:.2f} nats a token)",
                "cross-entropy above the packaged text's",
                ce - ce_elsewhere,
                limits.text_gap,
                "text.dataset: text of the language and kind that the model was trained on",
            )
        ]
    return []


def needs_comparison(ce: float, vocab_size: int, limits: Limits = LIMITS) -> bool:
    """Whether `diagnose_text` should be told the cross-entropy elsewhere."""
    return limits.suspicious < ce / math.log(vocab_size) <= limits.chance


# --- rules -----------------------------------------------------------------------------------


def _sparsity(place: str, summary: TrainingSummary, limits: Limits) -> list[Finding]:
    config, share = summary.config, summary.l0 / summary.d_in
    asked = getattr(config, "k", None) or getattr(config, "target_l0", None)
    if asked and not asked / limits.l0_off <= summary.l0 <= asked * limits.l0_off:
        if not hasattr(config, "target_l0"):
            change = "train.tokens: raise, so that the threshold settles"
        elif summary.l0 < asked:
            change = f"{place}.learning_rate: lower (now {config.learning_rate:g}), so that thresholds do not overshoot"
        else:
            change = f"{place}.sparsity_coefficient: raise, or train.tokens"
        return [
            Finding(
                "l0_off_target",
                f"L0 is {summary.l0:.4g} on held-out text where {asked:g} were asked for",
                "L0 / asked",
                summary.l0 / asked,
                limits.l0_off,
                change,
            )
        ]
    if share > limits.l0_high:
        return [
            Finding(
                "l0_too_high",
                f"{summary.l0:.4g} latents a token, {share:.0%} of d_in: hardly sparse",
                "L0 / d_in",
                share,
                limits.l0_high,
                _knob(place, config, down=True),
            )
        ]
    if share < limits.l0_low or summary.l0 < 1:
        return [
            Finding(
                "l0_too_low",
                f"{summary.l0:.3g} latents a token cannot reconstruct {summary.d_in} dimensions",
                "L0 / d_in",
                share,
                limits.l0_low,
                _knob(place, config, down=False),
            )
        ]
    return []


def _learning_rate(place: str, summary: TrainingSummary, limits: Limits) -> list[Finding]:
    rate, now = f"{place}.learning_rate", f"(now {summary.config.learning_rate:g})"
    shape = curve_shape(summary.curve, summary.decay_fraction, summary.sparsity_warmup_fraction)
    below = _below_pca(summary)

    def too_high(says: str, figure: str, value: float, limit: float) -> list[Finding]:
        return [Finding("learning_rate_too_high", says, figure, value, limit, f"{rate}: lower {now}")]

    def too_low(says: str, figure: str, value: float, limit: float) -> list[Finding]:
        return [Finding("learning_rate_too_low", says, figure, value, limit, f"{rate}: raise {now}, or train.tokens")]

    if shape is not None and shape.collapse > limits.collapse:
        says = f"variance explained fell by {shape.collapse:.2g} on the way"
        return too_high(says, "fall of variance explained", shape.collapse, limits.collapse)
    if shape is not None and shape.spike > limits.spike:
        return too_high("the loss jumps", "highest row against its neighbours", shape.spike, limits.spike)
    if shape is not None and shape.rise > limits.rising:
        return too_high("the loss rises again", "rise above its lowest stretch", shape.rise, limits.rising)
    if shape is not None and shape.drop > limits.decay_drop and shape.drop > limits.decay_ratio * max(shape.fall, 0.0):
        says = f"the loss fell by {shape.fall:.1%} in the run's middle and by {shape.drop:.1%} once the rate decayed"
        return too_high(says, "fall during the decay", shape.drop, limits.decay_drop)
    if shape is not None and shape.fall > limits.still_falling:
        says = f"the loss was still falling, by {shape.fall:.1%} from 40 % of the run to the decay"
        return too_low(says, "fall before the decay", shape.fall, limits.still_falling)
    if below is not None:
        n, pca = below
        says = (
            f"it explains less variance than {n} principal components with {summary.l0:.4g} latents a token: "
            "it has not learnt yet"
        )
        return too_low(says, "variance explained", summary.variance_explained, pca)
    return []


def _latents(place: str, summary: TrainingSummary, limits: Limits) -> list[Finding]:
    found = []
    if summary.fraction_silent > limits.dead:
        if hasattr(summary.config, "resample_every") and summary.config.resample_every == 0:
            change = f"{place}.resample_every: 0.1"
        elif hasattr(summary.config, "aux_k_coefficient"):
            change = f"{place}.aux_k_coefficient: raise (now {summary.config.aux_k_coefficient:g}), or learning_rate: lower"
        else:
            change = f"{place}.learning_rate: lower (now {summary.config.learning_rate:g}), or d_sae"
        found.append(
            Finding(
                "dead_latents",
                f"{summary.fraction_silent:.1%} of latents did not fire any more at the end",
                "fraction of latents silent",
                summary.fraction_silent,
                limits.dead,
                change,
            )
        )
    if summary.dense_share > limits.dense and summary.l0 <= limits.l0_high * summary.d_in:  # where all is dense, L0 says so
        found.append(
            Finding(
                "dense_latents",
                f"{summary.dense_share:.0%} of L0 comes from latents that fire on more than {DENSE_FROM:.0%} of tokens",
                "share of L0 from dense latents",
                summary.dense_share,
                limits.dense,
                _knob(place, summary.config, down=True),
            )
        )
    return found


def _width(place: str, summary: TrainingSummary, limits: Limits) -> list[Finding]:
    width = summary.config.d_sae
    if (
        summary.l0 < limits.narrow_l0 * summary.d_in
        or summary.variance_explained >= limits.narrow_variance
        or width >= limits.narrow_width * summary.d_in
    ):
        return []
    return [
        Finding(
            "too_narrow",
            f"{summary.l0:.4g} latents a token explain only {summary.variance_explained:.1%}",
            "variance explained",
            summary.variance_explained,
            limits.narrow_variance,
            f"{place}.d_sae: raise (now {width})",
        )
    ]


def _knob(place: str, config: SAERecipe, down: bool) -> str:
    """What to change for a lower L0 (`down`) or a higher one."""
    if config.sparsity is None:
        return f"{place}: settings for {'fewer' if down else 'more'} active latents"
    key, effect = config.sparsity
    return f"{place}.{key}: {'lower' if down == (effect == 'raises') else 'raise'} (now {getattr(config, key):g})"


def _below_pca(summary: TrainingSummary) -> tuple[int, float] | None:
    """(components, what they explain) where the SAE explains less with at least as many latents a token."""
    fewer = [n for n in summary.pca if n <= summary.l0]
    if fewer and summary.variance_explained < summary.pca[max(fewer)]:
        return max(fewer), summary.pca[max(fewer)]
    return None


# --- curves ----------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A curve in five numbers, all but the last shares of the loss."""

    fall: float
    """From around 40 % of the run to the last tenth before the decay."""
    drop: float
    """From there to the last twentieth of the run; 0 without a decay."""
    rise: float
    """Of the last tenth before the decay above the lowest tenth since the curve settled."""
    spike: float
    """Largest row since the curve settled against the median of its six neighbours."""
    collapse: float
    """Largest fall of variance explained below its best so far."""


SETTLED = 0.15
"""Fraction of the run after which a curve is judged, or later where the sparsity penalty comes in longer."""


def curve_shape(curve: Sequence[CurvePoint], decay_fraction: float, sparsity_warmup_fraction: float = 0.0) -> Shape | None:
    """None for a curve too short to judge, without a flat stretch of learning rate and penalty in its middle, or with a
    loss that is not positive."""
    decay_from, settled = 1.0 - decay_fraction, max(SETTLED, sparsity_warmup_fraction)
    if len(curve) < MIN_ROWS or decay_from < 0.6 or settled > 0.35 or not all(point.loss > 0 for point in curve):
        return None
    middle, before = _mean(curve, 0.35, 0.45), _mean(curve, decay_from - 0.1, decay_from)
    end = _mean(curve, 0.95, 1.01)
    if middle is None or before is None or end is None:
        return None
    tenths = [
        value
        for start in range(round(100 * settled), round(100 * decay_from) - 9, 5)
        if (value := _mean(curve, start / 100, start / 100 + 0.1)) is not None
    ]
    late = [point.loss for point in curve if point.progress > settled]
    spikes = [
        value / median(around) for i, value in enumerate(late) if (around := late[max(0, i - 3) : i] + late[i + 1 : i + 4])
    ]
    best = accumulate((point.variance_explained for point in curve), max)
    collapse = max(top - point.variance_explained for top, point in zip(best, curve, strict=True))
    return Shape(
        fall=1 - before / middle,
        drop=1 - end / before if decay_fraction > 0 else 0.0,
        rise=before / min(tenths) - 1,
        spike=max(spikes),
        collapse=collapse,
    )


def _mean(curve: Sequence[CurvePoint], start: float, end: float) -> float | None:
    inside = [point.loss for point in curve if start <= point.progress < end]
    return mean(inside) if inside else None


# --- in words --------------------------------------------------------------------------------


def as_json(finding: Finding) -> dict[str, Any]:
    return finding._asdict()


def lines(found: dict[str, list[Finding]]) -> list[str]:
    """For the terminal: a line a finding, `name: what it says (metric 0.21, limit 0.05); change this`; a fault that
    several SAEs share is one line with all their metrics."""
    shared: dict[tuple[str, str, str], list[tuple[str, Finding]]] = {}
    for name, findings in found.items():
        for finding in findings:
            change = re.sub(r" \(now [^)]*\)", "", finding.change.replace(f"train.saes.{name}.", "train.saes.*."))
            shared.setdefault((finding.what, finding.figure, change), []).append((name, finding))
    written = []
    for (what, figure, change), cases in shared.items():
        name, finding = cases[0]
        if len(cases) == 1:
            written.append(
                f"{name}: {finding.says} ({figure} {finding.value:.3g}, limit {finding.limit:.3g}); {finding.change}"
            )
        else:
            values = ", ".join(f"{name} {finding.value:.3g}" for name, finding in cases)
            written.append(f"{what.replace('_', ' ')} ({figure}, limit {finding.limit:.3g}): {values}; {change}")
    return written
