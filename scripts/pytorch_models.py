#!/usr/bin/env python3
"""Write torchvision's networks, and what PyTorch computes with them, for the Rust tests.

    python scripts/pytorch_models.py --out DIR

Needs torch, torchvision and safetensors. `cargo xtask torchvision` runs it and then the tests
(`crates/burn-conv-bn-models/tests/torchvision.rs`). Some 1.8 GB; nothing of it is committed.

For each network, in float64, with random weights, scales and shifts of the norms off 1 and 0,
running statistics off their initial values, ten classes, no dropout and no stochastic depth:

    NAME.pt, NAME.safetensors   the state_dict
    NAME.grads.safetensors      its gradients by the same names, after one training step; in the
                                place of buffers, the buffers after the step
    NAME.values.safetensors     images, targets; the step's logits and cross entropy; before it,
                                the logits in evaluation mode
    NAME.f32.safetensors        how far PyTorch's float32 is from all of that, by the same names: the
                                2-norms of the differences

and for ResNet-18 and DenseNet-121 the cross entropies of 30 steps of SGD (`losses`, over `batches` of
images with `labels`), from the same weights.
"""

import argparse
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.models as models
from safetensors.torch import save_file

CLASSES = 10
BATCH = 4
SIZE = 64
STEPS = 30

# The networks that are trained.
TRAINED = ("resnet18", "densenet121")

# The names of a network's outputs.
OUTPUTS = ("evaluation", "logits", "loss")


def vgg16_bn():
    # The classifier of the original would be 100 million parameters.
    net = models.vgg16_bn(num_classes=CLASSES, dropout=0.0)
    hidden = 32
    net.classifier = nn.Sequential(
        nn.Linear(512 * 7 * 7, hidden),
        nn.ReLU(True),
        nn.Dropout(0.0),
        nn.Linear(hidden, hidden),
        nn.ReLU(True),
        nn.Dropout(0.0),
        nn.Linear(hidden, CLASSES),
    )
    return net


NETWORKS = {
    "resnet18": lambda: models.resnet18(num_classes=CLASSES),
    "resnet34": lambda: models.resnet34(num_classes=CLASSES),
    "resnet50": lambda: models.resnet50(num_classes=CLASSES),
    "resnet101": lambda: models.resnet101(num_classes=CLASSES),
    "vgg16_bn": vgg16_bn,
    "mobilenet_v2": lambda: models.mobilenet_v2(num_classes=CLASSES, dropout=0.0),
    "efficientnet_b0": lambda: models.efficientnet_b0(
        num_classes=CLASSES, dropout=0.0, stochastic_depth_prob=0.0
    ),
    "densenet121": lambda: models.densenet121(num_classes=CLASSES),
}


def perturb(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def contiguous(tensors):
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def step(net, images, targets):
    """What the tests compare: the outputs, and by the keys of the state_dict gradients of parameters and buffers
    after the step."""
    found = {}
    with torch.no_grad():
        found["evaluation"] = net.eval()(images)
    net.train().zero_grad()
    found["logits"] = net(images)
    loss = F.cross_entropy(found["logits"], targets)
    loss.backward()
    found["loss"] = loss.reshape(1)
    found.update(net.state_dict())
    found.update((key, parameter.grad) for key, parameter in net.named_parameters())
    return contiguous(found)


def single_distances(net, state, values, exact):
    """How far float32 is from what is exact: the 2-norms of the differences, as vectors of one number.

    It is the farthest of several runs. Each sees the batch in another order, in which its sums are
    rounded differently, so that a value that is exact by chance is not taken for the rule.
    """
    net.float()
    farthest = {}
    for shift in range(BATCH):
        net.load_state_dict(state)
        images = values["images"].float().roll(shift, 0)
        found = step(net, images, values["targets"].roll(shift, 0))
        for name in ("evaluation", "logits"):
            found[name] = found[name].roll(-shift, 0)
        for name, wanted in exact.items():
            # Not the number of batches, which is no result.
            if wanted.is_floating_point():
                distance = (found[name].double() - wanted).norm().reshape(1)
                farthest[name] = torch.maximum(distance, farthest.get(name, distance))
    return farthest


def train(net, values):
    """Adds the losses of 30 steps to the values."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    values["batches"] = torch.randn(4, 2 * BATCH, 3, SIZE, SIZE, dtype=torch.float64)
    values["labels"] = torch.randint(0, CLASSES, (4, 2 * BATCH))
    losses = []
    net.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        index = step % len(values["batches"])
        loss = F.cross_entropy(net(values["batches"][index]), values["labels"][index])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    values["losses"] = torch.tensor(losses, dtype=torch.float64)


def write(name, out):
    torch.manual_seed(7)
    net = NETWORKS[name]().double()
    perturb(net)
    state = contiguous(net.state_dict())
    torch.save(state, out / f"{name}.pt")
    save_file(state, out / f"{name}.safetensors")
    if name == "resnet18":
        # As a program that trains on several GPUs writes it.
        parallel = {f"module.{key}": value for key, value in state.items()}
        torch.save({"epoch": 3, "state_dict": parallel}, out / f"{name}.checkpoint.pt")

    values = {
        "images": torch.randn(BATCH, 3, SIZE, SIZE, dtype=torch.float64),
        "targets": torch.randint(0, CLASSES, (BATCH,)),
    }
    exact = step(net, values["images"], values["targets"])
    values.update((output, exact[output]) for output in OUTPUTS)
    grads = {key: exact[key] for key in state}
    save_file(grads, out / f"{name}.grads.safetensors")

    distances = single_distances(net, state, values, exact)
    save_file(distances, out / f"{name}.f32.safetensors")

    if name in TRAINED:
        net.double().load_state_dict(state)
        train(net, values)
    save_file(contiguous(values), out / f"{name}.values.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in NETWORKS:
        write(name, args.out)
        print(f"wrote {name}", flush=True)


if __name__ == "__main__":
    main()
