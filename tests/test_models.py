"""The paper's networks to the parameter, any number of classes, channels and sizes, and honest refusals."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from aerl.config.targets import bind
from aerl.errors import UserError
from aerl.models import CNN, AliCNN, Classifier, PreActResNet, WideResNet, resnet18_cifar, torchvision_net, vit


@pytest.mark.parametrize(
    ("network", "classes", "parameters"),
    [(CNN, 10, 3_706_274), (CNN, 100, 3_729_404), (AliCNN, 10, 2_349_258), (AliCNN, 100, 2_441_508)],
)
def test_parameter_counts_are_the_papers(network, classes, parameters):
    net = network(num_classes=classes, channels=3, size=(32, 32))
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(
    ("network", "settings", "parameters"),
    [
        (resnet18_cifar, {}, 11_173_962),
        (PreActResNet, {}, 11_172_170),
        (WideResNet, {"depth": 28, "width": 10}, 36_479_194),
        (WideResNet, {"depth": 34, "width": 10}, 46_160_474),
    ],
)
def test_parameter_counts_are_the_publications(network, settings, parameters):
    with torch.device("meta"):
        net = network(num_classes=10, channels=3, **settings)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(
    "make",
    [
        resnet18_cifar,
        PreActResNet,
        lambda **sizes: WideResNet(depth=10, width=2, **sizes),
        lambda **sizes: vit(size=(8, 8), layers=2, hidden=32, mlp=32, **sizes),
    ],
)
def test_networks_for_small_images_learn_a_batch(make, channels=1):
    torch.manual_seed(0)
    net, x, y = make(num_classes=4, channels=channels), torch.rand(8, channels, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert (net(x).argmax(1) == y).all()


def test_pre_activation_blocks_are_identities_where_nothing_is_added():
    """With the second convolutions at zero, a stage without a shortcut passes its input on."""
    net = WideResNet(num_classes=3, channels=3, depth=16, width=1).eval()
    for block in net.blocks:
        nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(net.blocks[:2](x), x) and net.blocks[2].shortcut is not None
    assert net.blocks(x).shape == (2, 64, 2, 2)


def test_sizes_that_do_not_fit_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"depth=29: expected 6 n \+ 4"):
        WideResNet(num_classes=10, channels=3, depth=29)
    with pytest.raises(UserError, match=r"model.net.patch=5: must divide .* 32x32"):
        vit(num_classes=10, channels=3, size=(32, 32), patch=5)
    with pytest.raises(UserError, match=r"model.net.heads=3: must divide model.net.hidden=256"):
        vit(num_classes=10, channels=3, size=(32, 32), heads=3)


def test_networks_of_timm():
    pytest.importorskip("timm")
    from aerl.models.timm_net import timm_net

    net = timm_net(num_classes=7, channels=1, model_name="resnet18", drop_rate=0.1)
    assert net(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(UserError, match=r"model_name=resnet19: timm has no such model; for example .*resnet18"):
        timm_net(num_classes=7, channels=3, model_name="resnet19")


@pytest.mark.skipif(not find_spec("robustbench"), reason="needs the extra robustbench")
def test_models_of_robustbench(tmp_path):
    from aerl.models.robustbench_net import robustbench_net

    with pytest.raises(UserError, match="model_name=Wong: RobustBench has no such Linf model of cifar10; for example"):
        robustbench_net(model_name="Wong")
    from robustbench.model_zoo.architectures.resnet import PreActBlock, PreActResNet

    # As downloaded: a file of weights at its place, for their architecture.
    net = PreActResNet(PreActBlock, [2, 2, 2, 2])
    folder = tmp_path / "cifar10/Linf"
    folder.mkdir(parents=True)
    torch.save(net.state_dict(), folder / "Wong2020Fast.pt")
    theirs = robustbench_net(model_name="Wong2020Fast", model_dir=str(tmp_path)).eval()
    x = torch.rand(2, 3, 32, 32)
    assert theirs(x).shape == (2, 10) and theirs(x).std() > 0


@pytest.mark.parametrize("library", ["timm", "robustbench"])
def test_a_missing_library_is_named_with_its_extra(library):
    if find_spec(library):
        pytest.skip("it is installed")
    with pytest.raises(UserError, match=rf"needs the extra {library}: pip install -e '.\[{library}\]'"):
        bind({"_target_": f"aerl.models.{library}_net.{library}_net", "model_name": "x"}, "model.net")


def test_layers_carry_the_papers_names():
    names = {name.partition(".")[0] for name in CNN(num_classes=10, channels=3, size=(32, 32)).state_dict()}
    assert names == {f"conv{i}" for i in range(1, 7)} | {f"bn{i}" for i in range(1, 8)} | {"fc1", "fc2"}
    names = {name.partition(".")[0] for name in AliCNN(num_classes=10, channels=3, size=(32, 32)).state_dict()}
    assert names == {"conv1", "conv2", "conv3", "conv4", "fc1", "fc2"}


def test_even_kernels_are_padded_as_pytorch_pads_same():
    net = CNN(num_classes=3, channels=2, size=(9, 11), width=0.05).eval()
    x = torch.rand(2, 2, 9, 11)
    same = nn.Conv2d(2, net.conv1.out_channels, 4, padding="same")
    same.load_state_dict(net.conv1.state_dict())
    first = net.conv1(nn.functional.pad(x, (0, 1, 0, 1)))
    with pytest.warns(UserWarning, match="even kernel"):
        torch.testing.assert_close(first, same(x))


@pytest.mark.parametrize("network", [CNN, AliCNN])
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (32, 32)), (1, (28, 30)), (4, (17, 9))])
def test_any_channels_and_size(network, channels, size):
    net = network(num_classes=7, channels=channels, size=size)
    assert net(torch.rand(2, channels, *size)).shape == (2, 7)


@pytest.mark.parametrize("network", [CNN, AliCNN])
def test_images_too_small_are_refused_in_one_line(network):
    with pytest.raises(UserError, match=r"^model=\w+: 7x32 images are too small; .*dataset\.size") as error:
        network(num_classes=10, channels=3, size=(7, 32))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "densenet121"])
def test_torchvision_networks_take_any_channels_and_resize_inside(arch):
    net = torchvision_net(num_classes=5, channels=1, size=(20, 24), arch=arch, resize=64).eval()
    x = torch.rand(2, 1, 20, 24, requires_grad=True)
    logits = net(x)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0  # an attack reaches the images' own pixels


def test_normalisation_is_part_of_the_model_and_of_its_state():
    class Identity(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    model = Classifier(Identity(), mean=(0.5, 0.25), std=(0.5, 2.0))
    x = torch.rand(3, 2, 1, 1)
    expected = torch.stack([(x[:, 0] - 0.5) / 0.5, (x[:, 1] - 0.25) / 2.0], 1).flatten(1)
    torch.testing.assert_close(model(x), expected)
    assert set(model.state_dict()) == {"normalize.mean", "normalize.std"}


@pytest.mark.parametrize(
    ("mean", "std", "named"),
    [
        ([float("nan")], [1], "model.mean"),
        ([0], [float("inf")], "model.std"),
        ([0], [0], "model.std"),
        ([0], [-1], "model.std"),
    ],
)
def test_a_normalisation_that_leaves_no_images_is_refused(mean, std, named):
    with pytest.raises(UserError, match=named):
        Classifier(nn.Flatten(), mean, std)


def test_a_normalisation_in_whole_numbers_takes_another_one_exactly():
    model, other = Classifier(nn.Flatten(), [0], [1]), Classifier(nn.Flatten(), [0.4914], [0.2470])
    model.load_state_dict(other.state_dict())
    x = torch.rand(2, 1, 3, 3)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("output", [lambda x: None, lambda x: (x, x), lambda x: x[0], lambda x: x[:, None],
                                    lambda x: x + 0j])  # fmt: skip
def test_what_is_no_batch_of_logits_is_refused_in_one_line(output):
    class Odd(nn.Module):
        def forward(self, x):
            return output(x.flatten(1))

    with pytest.raises(UserError, match=r"^model.net: returned ") as error:
        Classifier(Odd(), [0], [1])(torch.rand(2, 1, 2, 2))
    assert "\n" not in str(error.value)
