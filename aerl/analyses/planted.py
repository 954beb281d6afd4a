"""Planted adversarial examples: does the run's own attack find what is known to be there?"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aerl.analyses import AnalysisContext, NotMade
from aerl.analyses.others import FinishedRun, saved
from aerl.attacks import Noise, SampleGenerator, attacking, collect_warnings, noise, predictions
from aerl.attacks.losses import margin
from aerl.attacks.projections import clip, random_extreme, random_in_ball
from aerl.data import Split, to_unit
from aerl.errors import UserError
from aerl.evaluation.evaluate import predict, run_attack
from aerl.evaluation.outcomes import so_far
from aerl.evaluation.statistics import proportion
from aerl.report import figures
from aerl.types import ORDERS, Count, Norm, Probability

log = logging.getLogger("aerl")

_CANDIDATES = 8  # places at which an example may be planted, per image
_GAP = 0.3  # of the way from the largest inner score to the planted one: where the decision boundary goes
_RIDGE = 0.1  # relative to the mean square of the features


def planted(
    context: AnalysisContext,
    *,
    samples: Count = 100,
    inner: Count = 300,
    draws: Count = 300,
    trusted: Probability = 0.95,
    layer: str | None = None,
    runs: Sequence[FinishedRun] = (),
) -> None:
    """Plant an adversarial example near each of `samples` images, and count those that the run's attack finds.

    The binarization test of Zimmermann et al. 2022 ("Increasing confidence in adversarial robustness evaluations",
    section 4). For each image, the last linear layer is replaced by a classifier of its input features that separates
    one point on the surface of the ball, the planted example, from the image and `inner` random points inside the
    ball. It gives the two classes that are likeliest at the image the logits 0 and s < 0, where s rises above 0 at the
    planted example, and the lead -s at the image is the model's own. The attacks of the run that count, unchanged and
    one after the other, must find an adversarial example for every image; `draws` random points are what a search
    without any gradient finds.

    layer: the name of the last linear layer, as in `named_modules()`; None: the last nn.Linear that is called.
    trusted: share of the planted examples, from which on the attack can be trusted on this model.

    Writes `planted` into summary.json: `found`, `random` (shares with intervals), `trusted` (true or false) and a
    sentence. With `runs`, other finished runs with this analysis, also figures/planted.png, with the shares of all.
    NotMade if the run has no attack, if no layer is found, or if nothing can be planted.
    """
    others = saved(runs, "planted")
    if not context.specs:
        raise NotMade("the run has no attack")
    if context.eps == 0:
        raise NotMade("eps is 0")
    counted = {info["of"] for info in context.attacks.values() if info["counts"]} or set(context.specs)
    split, device = context.right(5 * samples), context.hardware.device
    split = _apart(split, context.norm, context.eps, samples)
    x = to_unit(split.images.to(device), context.hardware.memory_format)
    with attacking(context.model), torch.no_grad(), collect_warnings():
        name, linear = _last_linear(context.model, x[:1], layer)
        if not torch.equal(context.model(x[:8]), context.model(x[:8])):
            raise NotMade("the model is randomised")
        model = _Planted(context, linear, x, split.labels.to(device))
        with model.installed():
            kept = model.plant(inner)
            if not kept.any():
                raise NotMade(f"the features of layer {name} separate no point of the ball's surface from its inside")
            split = Split(split.images[kept], split.labels[kept])
            found = _attack(context, model, split, {key: context.specs[key] for key in context.specs if key in counted})
            by_chance = _attack(context, model, split, {"random": _random_search(context, draws)})
    n = len(split)
    share, chance = proportion(found, n), proportion(by_chance, n)
    text = (
        f"the attack found {found} of {n} planted adversarial examples ({100 * share['low']:.0f} to "
        f"{100 * share['high']:.0f} %), {draws} random points found {by_chance}"
    )
    report = {"found": share, "random": chance, "trusted": share["value"] >= trusted, "layer": name, "says": text}
    context.save(planted=report)
    if runs:
        shown = {context.this_run: report, **others}
        context.draw("planted", _draw(shown, trusted), "planted adversarial examples that were found, 95 % intervals")
    context.log.log(
        {"planted_found": share["value"], "planted_random": chance["value"]},
        n=n, split="test", attack="planted", norm=context.norm, eps=context.eps,
    )  # fmt: skip


def _draw(shown: Mapping[str, Mapping[str, Any]], trusted: float) -> Any:
    figure, ((axis,),) = figures.subplots(figsize=(6.4, 1.4 + 0.5 * len(shown)))
    for height, (key, label) in zip((-0.1, 0.1), (("found", "attack"), ("random", "random points")), strict=True):
        rows = [report[key] for report in shown.values()]
        value = [100 * row["value"] for row in rows]
        spread = [[100 * abs(row[end] - row["value"]) for row in rows] for end in ("low", "high")]
        places = [number + height for number in range(len(rows))]
        axis.errorbar(value, places, xerr=spread, fmt="o" if key == "found" else "x", capsize=3, label=label)
    axis.axvline(100 * trusted, color="grey", linestyle=":", label="trusted from here")
    axis.set_yticks(range(len(shown)), list(shown))
    axis.set(xlim=(-2, 102), ylim=(len(shown) - 0.5, -0.5), xlabel="% of the planted examples found")
    axis.legend(frameon=False, fontsize=8)
    return figure


def _attack(context: AnalysisContext, model: nn.Module, split: Split, attacks: Mapping[str, Any]) -> int:
    """The number of images that the attacks fool, each attack for those that withstood the ones before."""
    size = context.batch_size
    clean = predict(model, split, context.hardware, size, examples=0)
    outcomes = {"label": split.labels.numpy(), **clean.columns("clean")}
    parts: list[str] = []
    for key, attack in attacks.items():
        before = so_far(outcomes, clean, parts)
        found = run_attack(
            attack, model, split, before, context.hardware, name=key, seed=context.seed, batch_size=size
        )  # fmt: skip
        for part, attacked in found.items():
            outcomes |= attacked.columns(part)
            parts.append(part)
    return int((so_far(outcomes, clean, parts).pred != split.labels.numpy()).sum())


def _random_search(context: AnalysisContext, draws: int) -> Callable[..., Tensor]:
    def search(model: nn.Module, x: Tensor, y: Tensor, *, generator: Noise) -> Tensor:
        return noise(model, x, y, generator=generator, norm=context.norm, eps=context.eps, draws=draws)

    return search


def _apart(split: Split, norm: Norm, eps: float, samples: int) -> Split:
    """The first `samples` images of a split that are more than 2 eps away from those chosen before: their balls do not
    touch."""
    flat = to_unit(split.images).flatten(1)
    near = (torch.cdist(flat, flat, p=ORDERS[norm]) <= 2 * eps).numpy()
    chosen: list[int] = []
    for row in range(len(split)):
        if len(chosen) < samples and not near[row, chosen].any():
            chosen.append(row)
    return Split(split.images[chosen], split.labels[chosen])


def _last_linear(model: nn.Module, x: Tensor, name: str | None) -> tuple[str, nn.Module]:
    """The name and the module of the last nn.Linear (or of `name`) that maps features (B, D) to logits (B, K)."""
    modules = dict(model.named_modules())
    if name is not None and name not in modules:
        near = ", ".join(key for key, module in modules.items() if isinstance(module, nn.Linear))
        raise UserError(f"analysis.planted.layer={name}: the model has no such module; its linear layers: {near}")
    called: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def record(key: str) -> Callable[..., None]:
        return lambda module, inputs, output: called.append((key, tuple(inputs[0].shape), tuple(output.shape)))

    handles = [
        module.register_forward_hook(record(key))
        for key, module in modules.items()
        if (isinstance(module, nn.Linear) if name is None else key == name)
    ]
    try:
        classes = model(x).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise NotMade("the model calls no linear layer; name its last one: analysis.planted.layer=NAME")
    key, features, logits = called[-1]
    if len(features) != 2 or logits != (1, classes):
        shapes = f"{features} to {logits}"
        raise NotMade(f"layer {key} maps {shapes}, not features (1, D) to logits (1, {classes})")
    return key, modules[key]


class _Planted(nn.Module):
    """The model of a context with a head of its own for each image x (n, C, H, W) of class y (n,).

    Row i of `weight` (n, D) and `bias` (n,) gives the score of class `rival[i]` near image i.
    """

    def __init__(self, context: AnalysisContext, linear: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.model, self.linear, self.norm, self.eps = context.model, linear, context.norm, context.eps
        self.x, self.y, self.batch_size, self.seed = x, y, context.batch_size, context.seed
        logits = self._batched(context.model, x)
        self.lead = -margin(logits, y)
        self.rival = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
        self.weight = self.bias = self.rows = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():  # the balls do not touch, so the nearest image is the one under attack
            order = ORDERS[self.norm]
            self.rows = torch.cdist(x.flatten(1).to(self.x), self.x.flatten(1), p=order).argmin(1)
        logits: Tensor = self.model(x)
        return logits

    @contextmanager
    def installed(self) -> Iterator[None]:
        handle = self.linear.register_forward_hook(self._replace)
        try:
            yield
        finally:
            handle.remove()

    def _replace(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.features = inputs[0]
        if len(self.weight) == 0:
            return output
        weight, bias, lead = (each[self.rows].to(output) for each in (self.weight, self.bias, self.lead))
        score = (inputs[0] * weight).sum(1) + bias
        logits = (-2 * lead - 10)[:, None].expand_as(output)  # of the other classes
        logits = logits.scatter(1, self.y[self.rows, None], 0.0)
        return logits.scatter(1, self.rival[self.rows, None], score[:, None])

    def plant(self, inner: int) -> Tensor:
        """Fit the heads; bool (n,), on the CPU: where the model then has an adversarial example."""
        generator = SampleGenerator.for_images(self.x, self.seed, "planted")
        weights, biases, places = [], [], []
        for i, x in enumerate(self.x):
            stream = generator[torch.full((inner,), i)]
            around = x.expand(inner, *x.shape)
            inside = clip(around, random_in_ball(around, self.norm, 0.95 * self.eps, stream), self.norm, self.eps)
            around = around[:_CANDIDATES]
            surface = clip(
                around,
                random_extreme(around, self.norm, self.eps, stream[torch.arange(_CANDIDATES)]),
                self.norm,
                self.eps,
            )
            features = self._batched(self._features, torch.cat([x[None], inside, surface])).double()
            weight, bias, place = _separate(features[: inner + 1], features[inner + 1 :], float(self.lead[i]))
            weights.append(weight)
            biases.append(bias)
            places.append(surface[place])
        self.weight, self.bias = torch.stack(weights), torch.stack(biases)
        wrong = predictions(self._batched(self, torch.stack(places))) != self.y
        right = predictions(self._batched(self, self.x)) == self.y
        return (wrong & right).cpu()

    def _features(self, x: Tensor) -> Tensor:
        self.model(x)
        return self.features

    def _batched(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([function(part) for part in torch.split(x, self.batch_size)])


def _separate(inside: Tensor, surface: Tensor, lead: float) -> tuple[Tensor, Tensor, int]:
    """w (D,) and b () such that w f + b is -lead at the first of the features `inside` (m, D), below 0 at all of
    them, and above 0 at one of `surface` (k, D), whose place is returned too.

    w is the direction of Fisher's discriminant, with a ridge, computed from the Gram matrix as D may be large.
    """
    mean = inside.mean(0)
    centred = inside - mean
    gram = centred @ centred.T
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram)).to(gram)
    towards = (surface - mean).T  # (D, k)
    weights = towards - centred.T @ torch.linalg.solve(gram + ridge, centred @ towards)
    scores, planted = inside @ weights, (surface * weights.T).sum(1)  # (m, k), (k,)
    largest = scores.amax(0)
    place = int(((planted - largest) / (largest - scores[0]).clamp_min(1e-30)).argmax())
    boundary = planted[place] - _GAP * (planted[place] - largest[place])
    scale = lead / (boundary - scores[0, place])
    return weights[:, place] * scale, -boundary * scale, place
