"""The paper's networks to the parameter, any number of classes, channels and sizes, and honest refusals."""

import pytest
import torch
from torch import nn

from aerl.errors import UserError
from aerl.models import CNN, AliCNN, Classifier, torchvision_net


@pytest.mark.parametrize(
    ("network", "classes", "parameters"),
    [(CNN, 10, 3_706_274), (CNN, 100, 3_729_404), (AliCNN, 10, 2_349_258), (AliCNN, 100, 2_441_508)],
)
def test_parameter_counts_are_the_papers(network, classes, parameters):
    net = network(num_classes=classes, channels=3, size=(32, 32))
    assert sum(p.numel() for p in net.parameters()) == parameters


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
