"""The checks of the masking audit, and what several of them share."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerl.analyses import AnalysisContext
from aerl.attacks import AutoAttack, SampleGenerator, attacking, collect_warnings, losses, pgd, predictions
from aerl.attacks.modes import input_gradient
from aerl.attacks.projections import ascent_direction, clip, norms, random_in_ball
from aerl.data import Split, subset, to_unit
from aerl.evaluation.outcomes import right
from aerl.evaluation.statistics import mcnemar
from aerl.runtime.device import is_out_of_memory, seed_from
from aerl.runtime.progress import progress
from aerl.types import UserError, first_line

_PIXELS = (1, 2, 3)
# The paper's attack steps along g / sqrt(max(1e-12, |g|^2)), with g the gradient of the mean over a batch.
_PAPER_FLOOR, _PAPER_BATCH = 1e-6, 256
_DRAWS = 32  # of noise in the ball
_FEW = 5  # runs, from which on a mean over them says something
_VOTES = 9  # passes that decide on the prediction of a randomised model
_PASSES = 5  # gradients that one step of EOT averages


@dataclass(frozen=True)
class Finding:
    """What a check found: a value, whether it is suspicious, and the sentence that says so."""

    value: float
    flag: bool
    says: str


class _NotMeasured(Exception):
    """A check has nothing to measure on this model, in this threat model; its text is the reason."""


@dataclass(frozen=True)
class Check:
    """One row of the audit. An effect is an attack that beats plain PGD, a symptom what may explain one; a
    formula tells of the paper's attack, and is no part of the verdict."""

    name: str
    role: Literal["effect", "symptom", "formula"]
    threshold: float
    source: str
    run: Callable[[float], Finding]


@dataclass(frozen=True)
class _Path:
    """Plain PGD's way: cross-entropy, margin and "is misclassified" of the steps + 1 iterates (B, steps + 1),
    "the gradient is zero" of all but the last (B, steps), and the last iterate (B, C, H, W)."""

    loss: Tensor
    margin: Tensor
    wrong: Tensor
    zero: Tensor
    last: Tensor


class Audit:
    """The samples under audit, and what several checks share: computed when the first of them asks.

    All masks are bool (n,), on the samples' device.
    """

    def __init__(
        self,
        context: AnalysisContext,
        samples: int,
        steps: int,
        queries: int,
        gain: float,
        significance: float,
    ) -> None:
        rows = torch.from_numpy(right(context.outcomes)).nonzero().squeeze(1)
        self.rows = subset(Split(rows, context.labels[rows]), samples).images
        self.n = len(self.rows)
        place = context.hardware.device
        self.x = to_unit(context.images[self.rows].to(place), context.hardware.memory_format)
        self.y = context.labels[self.rows].to(place)
        self.cost = _Cost()
        self.model = _Metered(context.model, context.batch_size, self.cost)
        self.context, self.norm, self.eps = context, context.norm, context.eps
        self.steps, self.queries, self.gain, self.significance = steps, queries, gain, significance
        self.failed: list[str] = []  # the checks that were to be made and could not be
        self.reason = ""
        if self.n == 0 or self.eps == 0:
            self.reason = "no sample is classified rightly" if self.n == 0 else "eps is 0"

    def make(self, plan: Sequence[Check]) -> list[dict[str, Any]]:
        """Make every check of the plan, whatever happens in one, save that memory does not suffice; the model and
        the global random state are left as they were."""
        devices = [self.x.device] if self.x.device.type == "cuda" else []
        with (
            attacking(self.model),
            torch.no_grad(),
            torch.random.fork_rng(devices),
            collect_warnings(),
            progress("masking", len(plan), "checks") as bar,
        ):
            # A randomised model draws from the global stream: a second audit shall find the same.
            torch.manual_seed(seed_from(self.context.seed, "masking"))
            began, rows = time.monotonic(), []
            try:  # so that its cost is told with the first check
                assert self.reason or self.plain
            except Exception as error:  # what a foreign model may raise is unknown
                if is_out_of_memory(error):
                    raise
                self.reason = f"plain PGD on cross-entropy cannot run: {first_line(error)}"
            for check in plan:
                row: dict[str, Any] = {"name": check.name, "value": None, "threshold": check.threshold}
                row |= {"flag": False, "role": check.role}
                try:
                    if self.reason:
                        raise _NotMeasured(self.reason)
                    row |= asdict(check.run(check.threshold))
                except _NotMeasured as error:
                    row["says"] = f"not measured: {error}"
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    row["says"] = f"failed: {first_line(error)}"
                    self.failed.append(check.name)
                passes = self.cost.passes / max(self.n, 1)
                rows.append(row | {"source": check.source, "seconds": time.monotonic() - began, "passes": passes})
                began, self.cost.passes = time.monotonic(), 0.0
                bar.update(1)
        return rows

    # What checks share.

    @cached_property
    def randomised(self) -> Tensor:
        """Samples whose logits differ between two passes by more than 1 % of their spread."""
        first, second = self.model(self.x), self.model(self.x)
        differs: Tensor = (first - second).abs().amax(1) > 0.01 * (first.amax(1) - first.amin(1))
        return differs

    @property
    def _votes(self) -> int:
        return _VOTES if self.randomised.any() else 1

    def wrong(self, x: Tensor, y: Tensor) -> Tensor:
        """Is x (B, C, H, W) misclassified, for a randomised model by the majority of fresh passes?"""
        votes = torch.stack([predictions(self.model(x)) != y for _ in range(self._votes)])
        return votes.float().mean(0) > 0.5

    def _batches(self, among: Tensor | None = None) -> Sequence[Tensor]:
        rows = torch.arange(self.n, device=self.x.device) if among is None else among.nonzero().squeeze(1)
        return torch.split(rows, self.model.batch_size)

    def _noise(self, index: Tensor, salt: str) -> SampleGenerator:
        return SampleGenerator.for_images(self.x[index], self.context.seed, f"masking/{salt}")

    def gradients(self, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, model: nn.Module | None = None) -> Tensor:
        """The gradient of a loss at images x (n, C, H, W), one for each sample."""
        parts = [_gradient(model or self.model, loss, x[index], self.y[index])[1] for index in self._batches()]
        return torch.cat(parts)

    @cached_property
    def ce_gradient(self) -> Tensor:
        return self.gradients(losses.ce, self.x)

    @cached_property
    def margin_gradient(self) -> Tensor:
        return self.gradients(losses.margin, self.x)

    @cached_property
    def logits(self) -> Tensor:
        return torch.cat([self.model(self.x[index]) for index in self._batches()])

    def path(self, among: Tensor | None = None, *, passes: int = 1, paper: bool = False) -> _Path:
        """Plain PGD (Madry et al. 2018), every step along the gradient averaged over `passes` passes, or as
        long as the paper's formula makes it."""
        parts = []
        for index in self._batches(among):
            origin, label = self.x[index], self.y[index]
            start = random_in_ball(origin, self.norm, self.eps, self._noise(index, "plain"))
            point = clip(origin, start, self.norm, self.eps)
            loss, margin, wrong, zero = [], [], [], []
            for step in range(self.steps + 1):
                drawn = [_gradient(self.model, losses.ce, point, label) for _ in range(passes)]
                if not all(logits.isfinite().all() for logits, _ in drawn):
                    raise _NotMeasured("the model returned NaN or infinite logits")
                logits, gradient = drawn[0][0], torch.stack([part for _, part in drawn]).sum(0)
                loss.append(losses.ce(logits, label))
                margin.append(losses.margin(logits, label))
                wrong.append(predictions(logits) != label)
                if step < self.steps:
                    zero.append(gradient.abs().amax(_PIXELS) == 0)
                    direction = ascent_direction(gradient, self.norm)
                    if paper:
                        direction *= _paper_step(gradient)[:, None, None, None]
                    delta = (point - origin).add_(direction, alpha=self.eps / 10)
                    point = clip(origin, delta, self.norm, self.eps)
            parts.append((*(torch.stack(told, 1) for told in (loss, margin, wrong, zero)), point))
        return _Path(*(torch.cat(part) for part in zip(*parts, strict=True)))

    @cached_property
    def plain(self) -> _Path:
        return self.path()

    @cached_property
    def missed(self) -> Tensor:
        """The samples that plain PGD leaves: at every iterate, or at the last of a randomised model."""
        if self.randomised.any():
            return ~torch.cat([self.wrong(self.plain.last[index], self.y[index]) for index in self._batches()])
        return ~self.plain.wrong.any(1)

    @cached_property
    def again(self) -> Tensor:
        """The samples that a second start of plain PGD fools, among those that the first has missed."""
        return self.fooled("again", self.pgd())

    def pgd(self, **settings: Any) -> Callable[..., Tensor]:
        """Plain PGD but for `settings`. On a randomised model one lucky pass shall not end the attack."""
        lasting = {"keep": "last", "drop_fooled": False} if self.randomised.any() else {}
        plain = {"norm": self.norm, "eps": self.eps, "steps": self.steps, "loss": "ce"}
        return partial(pgd, **{**plain, **lasting, **settings})

    def fooled(
        self,
        salt: str,
        attack: Callable[..., Any],
        *,
        among: Tensor | None = None,
        model: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
        batches: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The samples that an attack fools, of those in `among` (what plain PGD has missed).

        The attack sees `model`, but its images are judged by the audited model, in float32.
        """
        fooled = torch.zeros(self.n, dtype=torch.bool, device=self.x.device)
        for index in self._batches(self.missed if among is None else among) if batches is None else batches:
            x, y = self.x[index], self.y[index]
            x_adv = attack(model or self.model, x.to(dtype), y, generator=self._noise(index, salt))
            fooled[index] = self.wrong(x_adv.float(), y)
        return fooled

    def share(self, mask: Tensor, threshold: float, says: str) -> Finding:
        """A symptom: flagged where it concerns more than `threshold` of the samples."""
        count = int(mask.sum())
        return Finding(count / self.n, count / self.n > threshold, f"{says} on {count} of {self.n} samples")

    def beats(self, fooled: Tensor, threshold: float, name: str) -> Finding:
        """An effect: samples fooled beyond plain PGD, against what a second start of plain PGD finds."""
        gained = fooled & self.missed
        count, again = int(gained.sum()), int(self.again.sum())
        chance = mcnemar(int((gained & ~self.again).sum()), int((self.again & ~gained).sum()), one_sided=True)
        return self._effect(
            count, f"{name} fools {count}, a second start {again} (p = {chance:.1g})", chance, threshold
        )

    def _effect(self, count: int, says: str, chance: float, threshold: float) -> Finding:
        flag = count / self.n > threshold and chance < self.significance
        left = int(self.missed.sum())
        return Finding(count / self.n, flag, f"of the {left} of {self.n} samples that plain PGD misses {says}")

    # Effects: an honest attack fools what plain PGD leaves.

    def restarts(self, threshold: float) -> Finding:
        count = int(self.again.sum())
        chance = mcnemar(count, 0, one_sided=True)
        return self._effect(count, f"a second start fools {count} (p = {chance:.1g})", chance, threshold)

    def more_steps(self, threshold: float) -> Finding:
        attack = self.pgd(steps=2 * self.steps, step_size=self.eps / 20)
        return self.beats(self.fooled("more_steps", attack), threshold, "PGD with twice as many half steps")

    def loss(self, loss: Literal["log_odds", "margin"], threshold: float) -> Finding:
        words = {"log_odds": "log-odds", "margin": "margin"}
        return self.beats(self.fooled(loss, self.pgd(loss=loss)), threshold, f"PGD on the {words[loss]}")

    def logit_scale(self, threshold: float) -> Finding:
        fooled = self.fooled("logit_scale", self.pgd(), model=_Rescaled(self.model))
        return self.beats(fooled, threshold, "PGD on the cross-entropy of rescaled logits")

    def float64(self, threshold: float) -> Finding:
        """Only where the gradients differ is the outcome worth the cost."""
        affected = self.missed & self._numerics[1]
        if not affected.any():
            left = int(self.missed.sum())
            return Finding(0.0, False, f"float64 gives the same gradient on the {left} samples plain PGD misses")
        fooled = self.fooled("again", self.pgd(), among=affected, model=self._double, dtype=torch.float64)
        return self.beats(fooled, threshold, "PGD in float64")

    def fgsm(self, threshold: float) -> Finding:
        attack = self.pgd(steps=1, step_size=self.eps, random_start=False)
        return self.beats(self.fooled("fgsm", attack), threshold, "one step of FGSM")

    def noise(self, threshold: float) -> Finding:
        """The draw of the highest loss of all."""

        def best_draw(model: nn.Module, x: Tensor, y: Tensor, *, generator: SampleGenerator) -> Tensor:
            best, highest = x, torch.full(y.shape, -torch.inf, device=x.device)
            for _ in range(_DRAWS):
                point = clip(x, random_in_ball(x, self.norm, self.eps, generator), self.norm, self.eps)
                loss = losses.margin(model(point), y).nan_to_num(torch.inf, torch.inf, -torch.inf)
                best = torch.where((loss > highest)[:, None, None, None], point, best)
                highest = highest.maximum(loss)
            return best

        return self.beats(self.fooled("noise", best_draw), threshold, f"the best of {_DRAWS} random draws")

    def square(self, threshold: float) -> Finding:
        """All samples at once: what Square finds depends on who shares its random numbers."""
        attack = AutoAttack(norm=self.norm, eps=self.eps, attacks=["square"], queries=self.queries)
        everyone = self.missed.nonzero().squeeze(1)
        fooled = self.fooled("square", attack, batches=[everyone] if len(everyone) else [])
        return self.beats(fooled, threshold, f"Square with {self.queries} queries")

    def transfer(self, threshold: float) -> Finding:
        """What this run has transferred within its threat model, and not only to what others had left."""
        fooled, used = torch.zeros_like(self.missed), []
        for name, told in self.context.attacks.items():
            if name.startswith("transfer") and not name.endswith("_refined") and told["counts"] and told["alone"]:
                wrong = self.context.outcomes[f"{name}_pred"] != self.context.outcomes["label"]
                fooled |= torch.from_numpy(wrong)[self.rows].to(fooled.device)
                used.append(name)
        if not used:
            raise _NotMeasured("no source; add attack=transfer")
        return self.beats(fooled, threshold, f"transferred examples ({', '.join(used)})")

    def eot(self, threshold: float) -> Finding:
        if not self.randomised.any():
            return Finding(0.0, False, "the model is deterministic: averaging gradients changes nothing")
        last = self.path(passes=_PASSES).last
        fooled = torch.cat([self.wrong(last[index], self.y[index]) for index in self._batches()])
        return self.beats(fooled, threshold, f"PGD with gradients averaged over {_PASSES} passes")

    # The attack must win once it may do anything, and never lose by a larger ball.

    @cached_property
    def ladder(self) -> dict[str, Tensor]:
        """Who is fooled by plain PGD in balls of growing size, the last of which holds the whole box."""
        everyone = torch.ones_like(self.missed)
        # Of larger balls most is outside the box, and so would be a random start.
        box = 1.0 if self.norm == "Linf" else math.sqrt(self.x[0].numel())
        return {
            "eps / 2": self.fooled("half", self.pgd(eps=self.eps / 2), among=everyone),
            "eps": ~self.missed,
            "2 eps": self.fooled("double", self.pgd(eps=2 * self.eps), among=everyone),
            "unbounded": self.fooled(
                "unbounded", self.pgd(eps=box, step_size=box / 20, random_start=False), among=everyone
            ),
        }

    def monotone(self, threshold: float) -> Finding:
        rungs = list(self.ladder.values())
        worst, flag = 0.0, False
        for smaller, larger in itertools.pairwise(rungs):
            lost, won = int((smaller & ~larger).sum()), int((larger & ~smaller).sum())
            rise = (lost - won) / self.n
            worst = max(worst, rise)
            flag |= rise > threshold and mcnemar(lost, won, one_sided=True) < self.significance
        shares = ", ".join(
            f"{100 * (1 - fooled.float().mean().item()):.0f} % ({name})" for name, fooled in self.ladder.items()
        )
        return Finding(worst, flag, f"robust to plain PGD in growing balls: {shares}")

    def unbounded(self, threshold: float) -> Finding:
        count = self.n - int(self.ladder["unbounded"].sum())
        says = f"plain PGD that may change the image at will leaves {count} of {self.n} samples"
        return Finding(count / self.n, count / self.n > threshold, says)

    # Symptoms.

    def deterministic(self, threshold: float) -> Finding:
        return self.share(self.randomised, threshold, "two passes give different logits")

    def probabilities(self, threshold: float) -> Finding:
        sums, low = self.logits.sum(1), self.logits.amin(1)
        mask = ((sums - 1).abs() < 1e-3) & (low >= 0)
        return self.share(mask, threshold, "the outputs are probabilities, not logits,")

    def saturated(self, threshold: float) -> Finding:
        """A confident network is saturated at the image; only where PGD does not get away does it matter."""
        certain = self.logits.softmax(1).gather(1, self.y[:, None]).squeeze(1) == 1
        says = f"the probability of the true class is exactly 1 in float32 on {int(certain.sum())} of {self.n} samples"
        return self.share(self.plain.loss[:, -1] == 0, threshold, f"{says}, and after plain PGD still")

    def zero_ce_gradient(self, threshold: float) -> Finding:
        mask = _is_zero(self.ce_gradient) & ~_is_zero(self.margin_gradient)
        return self.share(
            mask, threshold, "the gradient of the cross-entropy is exactly zero, that of the margin is not,"
        )

    def zero_gradient(self, threshold: float) -> Finding:
        """Gone from every loss, though the outputs do depend on the image."""
        changed = torch.zeros_like(self.missed)
        for index in self._batches():
            x, noise = self.x[index], self._noise(index, "zero_gradient")
            for _ in range(4):
                moved = self.model(clip(x, random_in_ball(x, self.norm, self.eps, noise), self.norm, self.eps))
                changed[index] |= (moved != self.logits[index]).any(1)
        mask = _is_zero(self.margin_gradient) & changed
        return self.share(
            mask,
            threshold,
            "the gradient of every loss is exactly zero though the output changes with the image",
        )

    @cached_property
    def _double(self) -> nn.Module:
        model = _Metered(deepcopy(self.model.model).double(), self.model.batch_size, self.cost)
        if model(self.x[:1].double()).dtype != torch.float64:
            raise UserError("the model returns float32 whatever it is given")
        return model

    @cached_property
    def _numerics(self) -> tuple[Tensor, Tensor]:
        """Where plain PGD ends: is the cross-entropy's gradient zero in float32 only; has it another direction?"""
        self._refuse_random()
        end = self.plain.last
        rounded, exact = self.gradients(losses.ce, end), self.gradients(losses.ce, end.double(), self._double)
        zero = _is_zero(rounded) & ~_is_zero(exact)
        return zero, ~_is_zero(exact) & (_cosine(rounded.double(), exact) < 0.9)

    def _refuse_random(self) -> None:
        if self.randomised.any():
            raise _NotMeasured("the model is randomised")

    def float64_gradient(self, threshold: float) -> Finding:
        zero, other = self._numerics
        says = (
            f"where plain PGD ends, the gradient of the cross-entropy is exactly zero in float32 but not in float64 "
            f"on {int(zero.sum())} of {self.n} samples, and has another direction"
        )
        return self.share(other, threshold, says)

    def step_length(self, threshold: float) -> Finding:
        """A normalised step has the length asked for unless the gradient is zero."""
        length = norms(ascent_direction(self.ce_gradient, "L2"), "L2").mean().item()
        return Finding(
            length,
            length < threshold,
            f"an honest step along the cross-entropy has {length:.2f} of its length",
        )

    def paper_step_length(self, threshold: float) -> Finding:
        length = _paper_step(self.ce_gradient)
        mean, under = length.mean().item(), int((length < 1).sum())
        says = (
            f"a step by the paper's formula (floor {_PAPER_FLOOR:g}, batch of {_PAPER_BATCH}) has {mean:.2f} of its "
            f"length at the image; {under} of {self.n} gradients are below the floor"
        )
        return Finding(mean, mean < threshold, says)

    def paper_formula(self, threshold: float) -> Finding:
        """From the same start, so that nothing but the length of the steps differs from plain PGD."""
        self._refuse_random()
        if self.norm != "L2":
            raise _NotMeasured("the paper's formula is that of L2")
        fooled = ~self.missed
        count = int((~self.path(fooled, paper=True).wrong.any(1)).sum()) if fooled.any() else 0
        chance = mcnemar(count, 0, one_sided=True)
        says = (
            f"PGD by the paper's formula, whose steps shrink with the gradient, misses {count} of the "
            f"{int(fooled.sum())} of {self.n} samples that plain PGD fools (p = {chance:.1g})"
        )
        share = count / self.n
        return Finding(share, share > threshold and chance < self.significance, says)

    def consistency(self, threshold: float) -> Finding:
        """Noise hardly turns the gradient of an honest network."""
        self._refuse_random()
        alive = self._alive()
        cosines = []
        for draw in range(2):
            noise = torch.cat([
                random_in_ball(self.x[index], self.norm, self.eps / 2, self._noise(index, f"consistency/{draw}"))
                for index in self._batches()
            ])  # fmt: skip
            cosines.append(_cosine(self.margin_gradient, self.gradients(losses.margin, self.x + noise))[alive])
        median = torch.stack(cosines).median().item()
        says = f"the median cosine between the margin's gradients at an image and beside it is {median:.2f}"
        return Finding(median, median < threshold, says)

    def slope(self, threshold: float) -> Finding:
        """Central differences over a fiftieth of the ball against the gradient's promise, both along it."""
        self._refuse_random()
        alive = self._alive()
        step = ascent_direction(self.margin_gradient, self.norm) * (self.eps / 50)
        promised = 2 * (step * self.margin_gradient).sum(_PIXELS)
        ahead, behind = (
            torch.cat(
                [losses.margin(self.model((self.x + sign * step)[index]), self.y[index]) for index in self._batches()]
            )
            for sign in (1, -1)
        )
        off = ~(((ahead - behind) / promised - 1).abs() <= 0.5)  # also where it is not a number
        count, of = int((off & alive).sum()), int(alive.sum())
        says = (
            f"the margin changes along its gradient by less than half or more than 1.5 times what it promises "
            f"on {count} of {of} samples"
        )
        return Finding(count / of, count / of > threshold, says)

    def _alive(self) -> Tensor:
        alive = ~_is_zero(self.margin_gradient)
        if not alive.any():
            raise _NotMeasured("every gradient of the margin is zero")
        return alive

    # Indicators of attack failure, on plain PGD's own way.

    def silent_success(self, threshold: float) -> Finding:
        wrong = self.plain.wrong
        return self.share(
            wrong.any(1) & ~wrong[:, -1],
            threshold,
            "plain PGD passes an adversarial example and ends on none",
        )

    def _failures(self) -> Tensor:
        """The margin on the way of the runs that fail (m, steps + 1), scaled to [0, 1]: the cross-entropy is
        exponential in it, so that it always seems to climb at the end."""
        loss = self.plain.margin[~self.plain.wrong.any(1)]
        if len(loss) < _FEW:
            raise _NotMeasured(f"plain PGD misses {len(loss)} samples, too few to judge its ways by")
        low, high = loss.amin(1, keepdim=True), loss.amax(1, keepdim=True)
        return (loss - low) / (high - low).clamp_min(torch.finfo(loss.dtype).tiny)

    def incomplete(self, threshold: float) -> Finding:
        best = self._failures().cummax(1).values
        count = int((best[:, -1] - best[:, -1 - max(1, self.steps // 4)] > 0.05).sum())
        says = (
            f"the margin still rises in the last quarter of plain PGD's steps on {count} of the {len(best)} of "
            f"{self.n} samples that it misses"
        )
        return Finding(count / self.n, count / self.n > threshold, says)

    def break_point(self, threshold: float) -> Finding:
        """Near 1 where the loss climbs in a straight line to the end, near 0 where it soon arrives."""
        loss = self._failures()
        time_ = torch.linspace(0, 1, loss.shape[1], device=loss.device).expand_as(loss)
        way = torch.stack([time_, loss], dim=2)
        chord = way[:, -1:] - way[:, :1]
        chord = chord / chord.norm(dim=2, keepdim=True)
        beside = way - way[:, :1]
        off = (beside - (beside * chord).sum(2, keepdim=True) * chord).norm(dim=2)
        knee = way[torch.arange(len(way)), off[:, 1:-1].argmax(1) + 1]
        mean = torch.cosine_similarity(knee - way[:, 0], knee - way[:, -1], dim=1).abs().mean().item()
        return Finding(
            mean,
            mean > threshold,
            f"the break-point angle of plain PGD's loss has a mean |cosine| of {mean:.2f}",
        )

    def increasing_loss(self, threshold: float) -> Finding:
        """The attacker's loss, 1 - the scaled cross-entropy, over those steps that raise it."""
        cost = 1 - self._failures()
        rises = cost.diff(dim=1) > 0
        height = ((cost[:, 1:] + cost[:, :-1]) / 2 * rises).sum(1) / rises.sum(1).clamp_min(1)
        mean = height.mean().item()
        return Finding(
            mean,
            mean > threshold,
            f"plain PGD's steps that go back do so at a mean height of {mean:.2f} of its loss",
        )

    def zero_on_path(self, threshold: float) -> Finding:
        before = self.plain.wrong.cumsum(1)[:, :-1] == 0
        share = ((self.plain.zero & before).sum(1) / before.sum(1).clamp_min(1)).mean().item()
        return Finding(
            share,
            share > threshold,
            f"the gradient of the cross-entropy is zero at {100 * share:.0f} % of plain PGD's steps",
        )


# ------------------------------------------------------------------------------------ models and tools


@dataclass
class _Cost:
    """Passes of one image through the model: forward and backward 1, forward alone 1/3."""

    passes: float = 0.0


class _Metered(nn.Module):
    """The model, its cost counted.

    Whatever asks it for many images without a gradient gets them `batch_size` at a time. A graph that is
    broken between image and logits is a gradient of zero, which is what an attack makes of it.
    """

    def __init__(self, model: nn.Module, batch_size: int, cost: _Cost) -> None:
        super().__init__()
        self.model, self.batch_size, self.cost = model, batch_size, cost

    def forward(self, x: Tensor) -> Tensor:
        climbing = torch.is_grad_enabled() and x.requires_grad
        self.cost.passes += len(x) if climbing else len(x) / 3
        if climbing:
            logits: Tensor = self.model(x)
            return logits if logits.requires_grad else logits + 0 * x.sum(_PIXELS)[:, None]
        return torch.cat([self.model(part) for part in torch.split(x, self.batch_size)])


class _Rescaled(nn.Module):
    """10 z / max|z|, the scale without a gradient: cross-entropy that cannot saturate."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        peak = logits.detach().abs().amax(1, keepdim=True)
        return 10 * logits / peak.clamp_min(torch.finfo(logits.dtype).tiny)


def _gradient(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and the gradient of the loss at x (B, C, H, W)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        gradient = input_gradient(loss(logits, y), x)
    return logits.detach(), gradient


def _paper_step(gradient: Tensor) -> Tensor:
    """The length (B,), at most 1, of the paper's step of unit length along a gradient (B, C, H, W)."""
    size = norms(gradient, "L2").flatten().double() / _PAPER_BATCH
    return (size / size.clamp_min(_PAPER_FLOOR)).to(gradient.dtype)


def _is_zero(gradient: Tensor) -> Tensor:
    return gradient.abs().amax(_PIXELS) == 0


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Per sample; 0 where one of them is zero."""
    cosine: Tensor = (ascent_direction(a, "L2") * ascent_direction(b, "L2")).sum(_PIXELS)
    return cosine
