#!/usr/bin/env python3
"""Write torchvision's networks, and what PyTorch computes with them, for the Rust tests.

    python scripts/pytorch_models.py --out DIR

Needs torch, torchvision and safetensors. `cargo xtask torchvision` runs it and then the tests
(`crates/burn-conv-bn-models/tests/torchvision.rs`). Some 800 MB; nothing of it is committed.

For each network, in float64, with random weights, scales and shifts of the norms off 1 and 0,
running statistics off their initial values, ten classes and no dropout:

    NAME.pt, NAME.safetensors   the state_dict
    NAME.grads.safetensors      its gradients by the same names, after one training step; in the
                                place of buffers, the buffers after the step
    NAME.values.safetensors     images, targets; the step's logits and cross entropy; before it,
                                the logits in evaluation mode

and for ResNet-18 the cross entropies of 30 steps of SGD (`losses`, over `batches` of images with
`labels`), from the same weights.
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
    "vgg16_bn": vgg16_bn,
    "mobilenet_v2": lambda: models.mobilenet_v2(num_classes=CLASSES, dropout=0.0),
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

    values = {
        "images": torch.randn(BATCH, 3, SIZE, SIZE, dtype=torch.float64),
        "targets": torch.randint(0, CLASSES, (BATCH,)),
    }
    with torch.no_grad():
        values["evaluation"] = net.eval()(values["images"])
    logits = net.train()(values["images"])
    loss = F.cross_entropy(logits, values["targets"])
    loss.backward()
    values["logits"] = logits
    values["loss"] = loss.reshape(1)
    grads = dict(net.state_dict())
    grads.update((key, parameter.grad) for key, parameter in net.named_parameters())
    save_file(contiguous(grads), out / f"{name}.grads.safetensors")

    if name == "resnet18":
        net.load_state_dict(state)
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
