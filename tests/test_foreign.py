"""Other people's models and attacks: how they are built and loaded, doubts about them, what their files cannot do."""

import json
import re

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.nn import functional as F

from aerl.build import attack as build_attack
from aerl.build import build
from aerl.config.compose import read
from aerl.config.targets import bind
from aerl.errors import UserError
from aerl.models import AliCNN, Classifier
from aerl.models.probe import drawn, probe
from aerl.training import checkpoint
from tests.conftest import ROOT

SIZES = {"num_classes": 7, "channels": 3, "size": (8, 8)}
JUDGED = ("trainer=none", "checkpoint=own")
QUIET = ("logger=none", "attack=none", "analysis=none", "hardware=cpu")  # the tests' own tensors are on the CPU
FOREIGN = ("model=foreign", "model.mean=[0]", "model.std=[1]")


def composed(*words: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return read(compose("config", overrides=[*QUIET, *words]))


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------- functions and classes


def keyword_function(width: int = 4, **kwargs: int) -> nn.Module:
    assert set(kwargs) == {"num_classes"}
    return nn.Linear(width, kwargs["num_classes"])


def plain_function(depth: int) -> nn.Module:
    return nn.Linear(depth, 7)


class KeywordClass(nn.Module):
    def __init__(self, **kwargs: int) -> None:
        super().__init__()
        self.out = nn.Linear(2, kwargs.pop("num_classes"))
        assert not kwargs


def test_num_classes_reaches_every_kind_of_target():
    for target in ("keyword_function", "KeywordClass"):
        bound = bind({"_target_": f"tests.test_foreign.{target}"}, "model.net", given=SIZES)
        assert bound.keywords == {"num_classes": 7}
        assert list(bound().parameters())[-1].shape == (7,)
    spec = {"_target_": "tests.test_foreign.plain_function", "depth": 3}
    assert bind(spec, "model.net", given=SIZES)().in_features == 3


def test_the_name_of_weights_where_the_annotation_is_an_enum():
    spec = {"_target_": "torchvision.models.resnet18", "weights": "IMAGENET1K_V1"}
    bound = bind(spec, "model.net", given=SIZES).keywords
    assert bound == {"weights": "IMAGENET1K_V1", "num_classes": 7}
    wrong = {"_target_": "torchvision.models.resnet18", "progress": "perhaps"}
    assert refusal(bind, wrong, "model.net").startswith("model.net.progress=perhaps: should be a valid boolean")


class Net(nn.Module):
    """Two convolutions and a linear layer, with a `fault`."""

    def __init__(self, fault: str = "", num_classes: int = 10) -> None:
        super().__init__()
        if fault == "constructor":
            raise SystemExit(0)
        self.fault = fault
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.Linear(256, num_classes)

    def forward(self, x):
        maps = self.b(self.a(x).relu())
        z = self.out(maps.view(-1, 256) if self.fault == "view" else maps.flatten(1))
        if self.fault == "put":
            return z.clone().put_(torch.zeros(1, dtype=torch.long), torch.zeros(1))
        if self.fault == "auxiliary":
            return (z, z) if self.training else z
        if self.fault == "breaks in training" and self.training:
            raise ReferenceError("no teacher")
        if self.fault == "no gradient":
            return z.detach()
        if self.fault == "one more":
            return torch.cat([z, z[:, :1]], 1)
        return z.squeeze() if self.fault == "squeeze" else {"a dict": z} if self.fault == "dict" else z


def lazy(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(num_classes))


def faulty(data_dir, fault: str, *words: str):
    target = ("model.net._target_=tests.test_foreign.Net", f"+model.net.fault={fault}")
    return composed(*FOREIGN, f"data_dir={data_dir}", *target, *words)


@pytest.mark.parametrize(
    ("fault", "words", "named"),
    [
        ("constructor", JUDGED, "SystemExit"),
        ("constructor", (), "SystemExit"),
        ("squeeze", JUDGED, r"\(10,\)"),
        ("dict", JUDGED, "a dict"),
        ("one more", JUDGED, "11 logits for 10"),
        ("auxiliary", (), "a tuple"),
        ("breaks in training", (), "ReferenceError: no teacher"),
        ("no gradient", (), "cannot be trained"),
        ("put", ("hardware.deterministic=true",), "RuntimeError: put_ .*deterministic"),
    ],
)
def test_a_model_that_cannot_be_used(data_dir, fault, words, named):
    line = refusal(build, faulty(data_dir, fault, *words))
    assert re.search(named, line) and line.startswith(("model=foreign: ", "model.net: "))


def test_a_target_that_fails_and_a_batch_of_one(data_dir):
    target = ("model.net._target_=torchvision.models.resnet18", "+model.net.weights=NOT_THERE")
    line = refusal(build, composed(*FOREIGN, *JUDGED, f"data_dir={data_dir}", *target))
    assert line.startswith("model.net: resnet18(weights='NOT_THERE', num_classes=10): KeyError")
    words = ("model=cnn", "model.net.width=0.05", f"data_dir={data_dir}", "trainer.batch_size=1")  # BatchNorm
    line = refusal(build, composed(*words))
    assert line.startswith("model=cnn: ValueError") and "trainer.batch_size=2" in line


@pytest.mark.parametrize("words", [JUDGED, ()])
def test_a_model_that_needs_contiguous_images(data_dir, caplog, words):
    with caplog.at_level("WARNING", logger="aerl"):
        model = build(faulty(data_dir, "view", *words)).model
    assert "contiguous" in caplog.text and "hardware.channels_last" in caplog.text
    plain = build(faulty(data_dir, "", *words, "hardware.channels_last=false")).model
    x = torch.rand(3, 1, 8, 8)
    for layout in (torch.channels_last, torch.contiguous_format):
        for n in (1, 3):
            assert torch.equal(model(x[:n].to(memory_format=layout)), plain(x[:n]))


@pytest.mark.parametrize("fault", ["auxiliary", "breaks in training", ""])
def test_faults_in_training_do_not_matter_without_training(data_dir, fault):
    assert build(faulty(data_dir, fault, *JUDGED)).recipe is None


def test_lazy_layers_get_their_shapes(data_dir):
    config = composed(*FOREIGN, f"data_dir={data_dir}", "model.net._target_=tests.test_foreign.lazy")
    first, again = build(config).model.state_dict(), build(config).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["net.1.num_batches_tracked"] == 0


def takes_no_images(model, *, generator):
    return model


def takes_anything(model, x, y, *, generator, norm="L2", eps=1.0):
    return x


class Fails:
    def __init__(self) -> None:
        raise NotImplementedError

    def __call__(self, model, x, y, *, generator):
        return x


@pytest.mark.parametrize(
    ("attack", "named"),
    [
        ({"_target_": "takes_no_images"}, "attack.theirs._target_=.*cannot be called"),
        ({"_target_": "Fails"}, "attack.theirs: NotImplementedError"),
        ({"_target_": "takes_anything", "norm": "l2"}, "attack.theirs.norm=l2: .*'L2'"),
        ({"_target_": "takes_anything", "eps": "much"}, "attack.theirs.eps=much: "),
        ({"_target_": "takes_anything", "eps": float("nan")}, "attack.theirs.eps=nan: "),
    ],
)
def test_an_attack_that_cannot_be_called(attack, named):
    spec = attack | {"_target_": f"tests.test_foreign.{attack['_target_']}"}
    assert re.match(named, refusal(build_attack, spec, "attack.theirs", "L2", 1.0))


# --------------------------------------------------------------------------------------- files of weights


def classifier(net: nn.Module | None = None) -> Classifier:
    return Classifier(net or AliCNN(num_classes=10, channels=1, size=(8, 8), hidden=8), (0.5,), (0.5,))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: {"state_dict": net.state_dict(), "epoch": 3, "best": 0.9},
        lambda net: {"model_state_dict": net.state_dict(), "optimizer_state_dict": {"state": {}}},
        lambda net: {"net": net.state_dict(), "acc": 93.5},
        lambda net: {"net": nn.DataParallel(net).state_dict()},
        lambda net: {"model": {"state_dict": nn.DataParallel(net).state_dict()}},
        lambda net: {f"module._orig_mod.{name}": tensor for name, tensor in net.state_dict().items()},
        lambda net: {"state_dict": {f"model.{name}": tensor for name, tensor in net.state_dict().items()}},
    ],
    ids=["state_dict", "model_state_dict", "net", "DataParallel", "nested", "compiled", "Lightning"],
)
def test_weights_as_training_scripts_save_them(tmp_path, wrap):
    net, model = classifier().net, classifier()
    torch.save(wrap(net), tmp_path / "weights.pt")
    assert not checkpoint.load_weights(model, tmp_path / "weights.pt")
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in model.net.state_dict().items())
    assert model.normalize.mean.item() == 0.5


def test_a_network_named_like_ours_keeps_its_own_normalisation(tmp_path):
    """Its state_dict has normalize.mean and even a net, but it is a bare network, not a Classifier."""
    inside, model = classifier(), classifier(classifier())
    inside.normalize.mean.fill_(0.1)
    torch.save(inside.state_dict(), tmp_path / "weights.pt")
    assert not checkpoint.load_weights(model, tmp_path / "weights.pt")
    assert model.normalize.mean.item() == 0.5 and model.net.normalize.mean.item() == pytest.approx(0.1)
    checkpoint.save({"model": model.state_dict()}, tmp_path / "ours.pt")
    assert checkpoint.load_weights(classifier(classifier()), tmp_path / "ours.pt")


def test_only_weights_are_read_from_a_file(tmp_path):
    pwned = tmp_path / "pwned"
    saved, model = classifier(), classifier()
    config = {"_target_": "os.system", "command": f"touch {pwned}", "model": {"net": {"_target_": "os.mkdir"}}}
    torch.save({"model": saved.state_dict(), "config": config}, tmp_path / "weights.pt")
    assert checkpoint.load_weights(model, tmp_path / "weights.pt")
    assert torch.equal(model.net.fc2.bias, saved.net.fc2.bias)
    assert not pwned.exists()


# ----------------------------------------------------------------------------------------------- the probe


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Then(nn.Module):
    """A small network with `f` of its logits, or `before` of the images."""

    def __init__(self, f=lambda z: z, before=lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        self.f, self.before = f, before

    def forward(self, x):
        return self.f(self.net(self.before(x)))


def stuck(layer: nn.Module) -> nn.Module:
    """A network that eval() does not reach."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), layer, nn.Linear(16, 5))
    net.train = lambda mode=True: net
    return net


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z * 2


@torch.inference_mode()
def inferred(z: torch.Tensor) -> torch.Tensor:
    return z * 2


def test_no_doubts_about_a_sound_model(x):
    regular = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.Linear(288, 5))
    head_at_zero = Then()
    nn.init.zeros_(head_at_zero.net[3].weight)
    for model in (Then(), classifier(), regular, Then(lambda z: F.log_softmax(z, 1)), head_at_zero):
        assert probe(model, x) == []


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Then(lambda z: z.softmax(1)), ["outputs are probabilities"]),
        (lambda: Then(lambda z: z / 0), ["outputs are not finite"]),
        (lambda: stuck(nn.BatchNorm1d(16)), [r"^1 of .* first is 2\) .* training mode", "depends on the other"]),
        (lambda: stuck(nn.Dropout()), ["training mode", "two passes .* differ"]),
        (lambda: Then(lambda z: F.dropout(z, 0.5)), ["two passes .* differ"]),
        (lambda: Then(before=lambda x: x + 0.1 * torch.randn_like(x)), ["two passes .* differ"]),
        (lambda: Then(lambda z: z - z.mean(0)), ["depends on the other images"]),
        (lambda: Then(torch.Tensor.detach), ["autograd"]),
        (lambda: Then(torch.no_grad()(lambda z: z * 1)), ["autograd"]),
        (lambda: Then(lambda z: torch.from_numpy(z.detach().numpy() * 2)), ["autograd"]),
        (lambda: Then(inferred), ["cannot be differentiated|autograd"]),
        (lambda: Then(NoBackward.apply), ["cannot be differentiated"]),
        (lambda: Then(before=lambda x: (x * 15).round() / 15), ["gradient is exactly zero on all 8 images"]),
        (lambda: Then(before=lambda x: (x - x).sqrt() + x), ["gradient is not finite"]),
    ],
)  # fmt: skip
def test_each_fault_and_no_other(x, make, expected):
    doubts = probe(make(), x)
    assert len(doubts) == len(expected), doubts
    for sentence, pattern in zip(doubts, expected, strict=True):
        assert re.search(pattern, sentence) and "\n" not in sentence


def test_the_probe_changes_nothing(x):
    net = nn.Sequential(stuck(nn.BatchNorm1d(16)), nn.Dropout())
    net[0][1].weight.requires_grad_(False)
    net[1].eval()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes, random = [module.training for module in net.modules()], torch.get_rng_state()
    assert probe(net, x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()].count(False) == 1
    assert all(p.grad is None for p in net.parameters()) and x.grad is None and not x.requires_grad
    assert torch.equal(torch.get_rng_state(), random)


def test_untrained_weights(x):
    one, other = Then(), Then()
    assert drawn(one, other) == []
    nn.init.normal_(other.net[3].weight)
    (sentence,) = drawn(one, other)
    assert sentence.startswith("1 of its 4 tensors (the first is net.3.weight) are drawn at random")


# --------------------------------------------------------------------------------------------- a whole run


def test_our_weights_as_a_foreign_file_are_the_same_model(tmp_path, data_dir):
    ours, path = classifier(), tmp_path / "theirs.pth"
    torch.save({"state_dict": nn.DataParallel(ours.net).state_dict(), "epoch": 90}, path)
    words = ("trainer=none", "model=foreign", f"data_dir={data_dir}", f"checkpoint={path}", "+model.net.hidden=8",
             "model.net._target_=aerl.models.AliCNN")  # fmt: skip
    assert refusal(composed, *words).startswith("model.mean: must be given")
    parts = build(composed(*words, "model.mean=[0.5]", "model.std=[0.5]"))
    assert parts.doubts == ()
    x = parts.data.test.images[:20] / 255
    torch.testing.assert_close(parts.model.eval()(x), ours.eval()(x))


def test_a_doubt_is_reported(launch, tmp_path):
    (tmp_path / "my_nets.py").write_text(
        "import torch\nfrom aerl.models import AliCNN\n\n\n"
        "def softmax(weights, **kwargs):\n"
        "    net = AliCNN(channels=1, size=(8, 8), hidden=8, **kwargs)\n"
        "    net.load_state_dict(torch.load(weights))\n"
        "    return torch.nn.Sequential(net, torch.nn.Softmax(1))\n"
    )
    torch.save(classifier().net.state_dict(), tmp_path / "plain.pth")
    done = launch(
        *JUDGED, *FOREIGN, "logger=none", "model.net._target_=my_nets.softmax", "+model.net.weights=plain.pth",
        "evaluation.samples=9", "attack=fgsm", "analysis=none", "name=soft", PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (doubt,) = json.loads((tmp_path / "runs/soft/summary.json").read_text())["doubts"]  # none about its weights
    assert doubt.startswith("its outputs are probabilities")
    assert f"warning    model: {doubt}" in done.stdout
    assert done.stderr.count(doubt) == 1
    assert doubt in (tmp_path / "runs/soft/run.log").read_text()


def test_own_weights_of_a_network_that_has_none(data_dir, tmp_path):
    torch.save(AliCNN(num_classes=10, channels=1, size=(8, 8)).state_dict(), tmp_path / "bare.pth")
    for source in ("own", str(tmp_path / "bare.pth")):
        words = ("trainer=none", f"checkpoint={source}", f"data_dir={data_dir}")
        assert re.match(f"checkpoint={source}: .*model.mean=.*model.std=", refusal(build, composed(*words)))
        parts = build(composed(*words, "model.mean=[0.5]", "model.std=[0.5]"))
        assert [doubt.split(" tensors")[0] for doubt in parts.doubts] == (["12 of its 12"] if source == "own" else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_own_weights_on_a_gpu(data_dir):
    """The second network that they are compared with is on the CPU."""
    words = (*JUDGED, f"data_dir={data_dir}", "model.mean=[0.5]", "model.std=[0.5]", "hardware=cuda")
    assert [doubt.split(" tensors")[0] for doubt in build(composed(*words)).doubts] == ["12 of its 12"]
