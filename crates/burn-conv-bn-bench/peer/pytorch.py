#!/usr/bin/env python3
"""PyTorch's contenders of `cargo xtask bench`: one of them in a process of its own.

Not for people: `cargo xtask bench --peer pytorch` starts it, writes a request a line to its
standard input, and reads a reply a line from its standard output. Requests and replies are those
of `src/protocol.rs` beside this folder; tensors are files of raw little-endian f32. Nothing but
torch is needed.

Contenders of a layer (conv -> batch norm -> ReLU), of the tutorial's network and of others:

eager       PyTorch's own layers.
compile     The same through torch.compile.
tutorial    The custom function of the tutorial "Fusing Convolution and Batch Norm using Custom
            Function", with stride, padding, dilation and groups added. Its norm is another than
            everybody else's and has no scale and shift, so it is checked against its own formula, and
            is not there for other networks and for volumes.
checkpoint  PyTorch's own layers, each block under torch.utils.checkpoint. In ResNets,
            MobileNetV2 and EfficientNet that is a residual block, which keeps its input alone, as one does
            there; in DenseNet a dense layer, which keeps the outputs before it; in YOLOX's backbone a
            stage's layer of bottlenecks; elsewhere one convolution with its norm and activation.
"""

import ctypes
import gc
import json
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path

# Standard output carries replies alone; prints go to standard error.
REPLIES = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def reply(message):
    REPLIES.write(json.dumps(message) + "\n")
    REPLIES.flush()


# torch.compile's pool of compiling processes would outlive this process and disturb others.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

try:
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from torch.autograd.function import once_differentiable
    from torch.utils.checkpoint import checkpoint
except ImportError as error:
    for _ in sys.stdin:
        reply({"unavailable": {"reason": str(error)}})
    sys.exit(0)

OWN_REFERENCE = "own"
EPSILON = 1e-5
# Images, and least height and width, of the step that warms up before memory is measured.
SMALL_BATCH, SMALL_SIZE = 2, 8
# Height and width of the same for networks of three-channel images.
SMALL_CLASSIFIER_SIZE = 64


# --- The tutorial's functions ---------------------------------------------------------------
#
# Copied from the tutorial, which has stride 1, no padding, no dilation and one group: that case keeps
# its formulae, and other geometries are added.


def convolution_backward(grad_out, X, weight, geometry, needs_X):
    stride, padding, dilation, groups = geometry
    if geometry == (1, 0, 1, 1):
        grad_input = F.conv2d(X.transpose(0, 1), grad_out.transpose(0, 1)).transpose(0, 1)
        grad_X = F.conv_transpose2d(grad_out, weight)
        return grad_X, grad_input
    grad_X, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_out,
        X,
        weight,
        None,
        [stride, stride],
        [padding, padding],
        [dilation, dilation],
        False,
        [0, 0],
        groups,
        [needs_X, True, False],
    )
    return grad_X, grad_weight


def unsqueeze_all(t):
    return t[None, :, None, None]


def batch_norm_backward(grad_out, X, sum, sqrt_var, N, eps):
    tmp = ((X - unsqueeze_all(sum) / N) * grad_out).sum(dim=(0, 2, 3))
    tmp *= -1
    d_denom = tmp / (sqrt_var + eps) ** 2
    d_var = d_denom / (2 * sqrt_var)
    d_mean_dx = grad_out / unsqueeze_all(sqrt_var + eps)
    d_mean_dx = unsqueeze_all(-d_mean_dx.sum(dim=(0, 2, 3)) / N)
    grad_input = X * unsqueeze_all(d_var * N)
    grad_input += unsqueeze_all(-d_var * sum)
    grad_input *= 2 / ((N - 1) * N)
    grad_input += d_mean_dx
    grad_input *= unsqueeze_all(sqrt_var + eps)
    grad_input += grad_out
    grad_input /= unsqueeze_all(sqrt_var + eps)
    return grad_input


class FusedConvBN2DFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, conv_weight, geometry, eps):
        assert X.ndim == 4
        ctx.save_for_backward(X, conv_weight)
        ctx.geometry = geometry
        X = F.conv2d(X, conv_weight, None, *geometry)
        sum = X.sum(dim=(0, 2, 3))
        var = X.var(unbiased=True, dim=(0, 2, 3))
        N = X.numel() / X.size(1)
        sqrt_var = torch.sqrt(var)
        ctx.eps = eps
        ctx.sum = sum
        ctx.N = N
        ctx.sqrt_var = sqrt_var
        mean = sum / N
        denom = sqrt_var + eps
        out = X - unsqueeze_all(mean)
        out /= unsqueeze_all(denom)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        X, conv_weight = ctx.saved_tensors
        X_conv_out = F.conv2d(X, conv_weight, None, *ctx.geometry)
        grad_out = batch_norm_backward(
            grad_out, X_conv_out, ctx.sum, ctx.sqrt_var, ctx.N, ctx.eps
        )
        needs_X = ctx.needs_input_grad[0]
        grad_X, grad_weight = convolution_backward(
            grad_out, X, conv_weight, ctx.geometry, needs_X
        )
        return grad_X, grad_weight, None, None


# --- Blocks ---------------------------------------------------------------------------------


# Convolution and norm by the number of spatial dimensions.
MODULES = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}
NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


class Block(nn.Module):
    """PyTorch's own conv -> batch norm -> (+ residual) -> activation, in place as in torchvision's
    networks."""

    def __init__(
        self,
        channels,
        kernel,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        affine=True,
        bias=False,
        activation=F.relu_,
        dims=2,
        eps=EPSILON,
        momentum=0.1,
    ):
        super().__init__()
        conv, norm = MODULES[dims]
        self.conv = conv(*channels, kernel, stride, padding, dilation, groups, bias)
        self.norm = norm(channels[1], eps, momentum, affine, track_running_stats=affine)
        self.activation = activation

    @property
    def weight(self):
        return self.conv.weight

    def forward(self, x, residual=None):
        x = self.norm(self.conv(x))
        if residual is not None:
            x += residual
        return x if self.activation is None else self.activation(x)


class TutorialBlock(nn.Module):
    """The tutorial's custom function, and ReLU in place as in its network."""

    def __init__(
        self, channels, kernel, stride=1, padding=0, dilation=1, groups=1, affine=True, dims=2
    ):
        super().__init__()
        if dims != 2:
            raise Unavailable("the tutorial's function is for images")
        self.geometry = (stride, padding, dilation, groups)
        shape = (channels[1], channels[0] // groups, kernel, kernel)
        self.weight = nn.Parameter(torch.empty(shape))
        self.eps = 1e-3

    def forward(self, x):
        return F.relu_(FusedConvBN2DFunction.apply(x, self.weight, self.geometry, self.eps))


class TutorialFormula(TutorialBlock):
    """The same by PyTorch's own differentiation."""

    def forward(self, x):
        x = F.conv2d(x, self.weight, None, *self.geometry)
        mean = x.sum(dim=(0, 2, 3)) / (x.numel() / x.size(1))
        std = torch.sqrt(x.var(unbiased=True, dim=(0, 2, 3)))
        return F.relu((x - unsqueeze_all(mean)) / unsqueeze_all(std + self.eps))


class Checkpointed(nn.Module):
    """A block that keeps its input and runs again in the backward pass."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    @property
    def weight(self):
        return self.block.weight

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def keeper_of(variant):
    """The wrapper of a block: a checkpoint, or none."""
    return Checkpointed if variant == "checkpoint" else (lambda block: block)


def block_of(variant, *args, **kwargs):
    if variant == "tutorial":
        return TutorialBlock(*args, **kwargs)
    if variant == "formula":
        return TutorialFormula(*args, **kwargs)
    return keeper_of(variant)(Block(*args, **kwargs))


class Net(nn.Module):
    """The tutorial's network. Its second ReLU after the pooling changes nothing and is left out,
    as in Burn's."""

    def __init__(self, variant):
        super().__init__()
        self.conv1 = block_of(variant, [1, 32], 3, affine=False)
        self.conv2 = block_of(variant, [32, 64], 3, affine=False)
        self.fc1 = nn.Linear(9216, 128)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = self.conv2(self.conv1(x))
        x = F.max_pool2d(x, 2).flatten(1)
        x = F.relu_(self.dropout(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


# --- Other networks -------------------------------------------------------------------------
#
# Torchvision's ResNet (version 1.5), VGG with batch norm, MobileNetV2, EfficientNet and DenseNet, without
# dropout and stochastic depth, and YOLOX's backbone. Modules are in the order in which Burn's networks are
# visited, which is that of the file of their parameters.

CLASSES = 1000
RELU6 = partial(F.relu6, inplace=True)
SILU = partial(F.silu, inplace=True)


def conv(channels, kernel, stride=1, **options):
    return Block(channels, kernel, stride, kernel // 2, **options)


class Chain(nn.Module):
    """Blocks one after the other; the last one adds the shortcut of the input."""

    def __init__(self, blocks, shortcut=None):
        super().__init__()
        self.first = nn.Sequential(*blocks[:-1])
        self.last = blocks[-1]
        self.shortcut = shortcut

    def forward(self, x):
        residual = None if self.shortcut is None else self.shortcut(x)
        return self.last(self.first(x), residual)


class Classifier(nn.Module):
    """Convolutions, a pool to a fixed size, and linear layers with ReLU between them."""

    def __init__(self, features, pooled, widths):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.pooled = pooled
        pairs = zip(widths, widths[1:])
        self.classifier = nn.ModuleList(nn.Linear(*pair) for pair in pairs)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), self.pooled).flatten(1)
        for index, linear in enumerate(self.classifier):
            x = linear(F.relu_(x) if index > 0 else x)
        return x


def resnet(keep, expansion, counts, is_small=False):
    def residual(channels_in, width, stride):
        channels = width * expansion
        if expansion == 1:
            blocks = [conv([channels_in, width], 3, stride), conv([width, width], 3)]
        else:
            blocks = [
                conv([channels_in, width], 1),
                conv([width, width], 3, stride),
                conv([width, channels], 1),
            ]
        changes = stride != 1 or channels_in != channels
        shortcut = conv([channels_in, channels], 1, stride, activation=None)
        return keep(Chain(blocks, shortcut if changes else nn.Identity()))

    if is_small:
        features = [keep(conv([3, 64], 3))]
    else:
        features = [keep(conv([3, 64], 7, 2)), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for layer, count in enumerate(counts):
        width = 64 << layer
        for index in range(count):
            stride = 2 if layer > 0 and index == 0 else 1
            features.append(residual(channels, width, stride))
            channels = width * expansion
    return Classifier(features, 1, [channels, 10 if is_small else CLASSES])


def vgg(keep, counts):
    features = []
    channels = 3
    for width, count in zip((64, 128, 256, 512, 512), counts):
        for _ in range(count):
            features.append(keep(conv([channels, width], 3, bias=True)))
            channels = width
        features.append(nn.MaxPool2d(2))
    return Classifier(features, 7, [channels * 7 * 7, 4096, 4096, CLASSES])


def mobilenet_v2(keep):
    def inverted_residual(channels_in, channels, expansion, stride):
        inner = channels_in * expansion
        expand = [conv([channels_in, inner], 1, activation=RELU6)] if expansion != 1 else []
        depthwise = conv([inner, inner], 3, stride, groups=inner, activation=RELU6)
        project = conv([inner, channels], 1, activation=None)
        adds = stride == 1 and channels_in == channels
        return keep(Chain([*expand, depthwise, project], nn.Identity() if adds else None))

    features = [keep(conv([3, 32], 3, 2, activation=RELU6))]
    channels_in = 32
    # Expansion, output channels, number of blocks, stride of the first.
    for expansion, channels, count, first_stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for index in range(count):
            stride = first_stride if index == 0 else 1
            features.append(inverted_residual(channels_in, channels, expansion, stride))
            channels_in = channels
    features.append(keep(conv([channels_in, 1280], 1, activation=RELU6)))
    return Classifier(features, 1, [1280, CLASSES])


class SqueezeExcitation(nn.Module):
    def __init__(self, channels, squeezed):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        gate = self.fc2(SILU(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(gate)


def efficientnet_b0(keep):
    def inverted_residual(channels_in, channels, expansion, kernel, stride):
        inner = channels_in * expansion
        expand = [conv([channels_in, inner], 1, activation=SILU)] if expansion != 1 else []
        depthwise = conv([inner, inner], kernel, stride, groups=inner, activation=SILU)
        squeeze = SqueezeExcitation(inner, channels_in // 4)
        project = conv([inner, channels], 1, activation=None)
        adds = stride == 1 and channels_in == channels
        blocks = [*expand, depthwise, squeeze, project]
        return keep(Chain(blocks, nn.Identity() if adds else None))

    features = [keep(conv([3, 32], 3, 2, activation=SILU))]
    channels_in = 32
    # Expansion, kernel, stride of the first block, output channels, number of blocks.
    for expansion, kernel, first_stride, channels, count in (
        (1, 3, 1, 16, 1),
        (6, 3, 2, 24, 2),
        (6, 5, 2, 40, 2),
        (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3),
        (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    ):
        for index in range(count):
            stride = first_stride if index == 0 else 1
            features.append(inverted_residual(channels_in, channels, expansion, kernel, stride))
            channels_in = channels
    features.append(keep(conv([channels_in, 1280], 1, activation=SILU)))
    return Classifier(features, 1, [1280, CLASSES])


class Normalized(nn.Module):
    """Batch norm and ReLU."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=EPSILON)

    def forward(self, x):
        return F.relu_(self.norm(x))


class DenseLayer(nn.Module):
    """Norm of all outputs before, 1x1 convolution with the norm behind it, 3x3 convolution."""

    def __init__(self, channels, growth):
        super().__init__()
        self.norm1 = Normalized(channels)
        self.conv1 = conv([channels, 4 * growth], 1)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, outputs):
        return self.conv2(self.conv1(self.norm1(torch.cat(outputs, 1))))


class DenseBlock(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(list(outputs)))
        return torch.cat(outputs, 1)


def densenet121(keep):
    growth = 32
    channels = 2 * growth
    features = [keep(conv([3, channels], 7, 2)), nn.MaxPool2d(3, 2, 1)]
    for index, count in enumerate((6, 12, 24, 16)):
        if index > 0:
            features.append(Normalized(channels))
            features.append(nn.Conv2d(channels, channels // 2, 1, bias=False))
            features.append(nn.AvgPool2d(2))
            channels //= 2
        layers = [keep(DenseLayer(channels + layer * growth, growth)) for layer in range(count)]
        features.append(DenseBlock(layers))
        channels += count * growth
    features.append(Normalized(channels))
    return Classifier(features, 1, [channels, CLASSES])


def yolox_block(channels, kernel, stride=1, groups=1):
    options = {"activation": SILU, "eps": 1e-3, "momentum": 0.03}
    return conv(channels, kernel, stride, groups=groups, **options)


def separable(channels, stride=1):
    inner = channels[0]
    return [yolox_block([inner, inner], 3, stride, inner), yolox_block(channels, 1)]


class Bottleneck(nn.Module):
    """A shortcut behind the last activation."""

    def __init__(self, channels, adds):
        super().__init__()
        blocks = [yolox_block([channels, channels], 1), *separable([channels, channels])]
        self.blocks = nn.Sequential(*blocks)
        self.adds = adds

    def forward(self, x):
        return self.blocks(x) + x if self.adds else self.blocks(x)


class CspLayer(nn.Module):
    """Bottlenecks over half of the channels beside the other half."""

    def __init__(self, channels, count, adds):
        super().__init__()
        hidden = channels // 2
        self.conv1 = yolox_block([channels, hidden], 1)
        self.conv2 = yolox_block([channels, hidden], 1)
        self.conv3 = yolox_block([2 * hidden, channels], 1)
        self.m = nn.Sequential(*(Bottleneck(hidden, adds) for _ in range(count)))

    def forward(self, x):
        return self.conv3(torch.cat((self.m(self.conv1(x)), self.conv2(x)), 1))


class Pyramid(nn.Module):
    """Max pools of growing windows side by side."""

    def __init__(self, channels, windows=(5, 9, 13)):
        super().__init__()
        hidden = channels // 2
        self.conv1 = yolox_block([channels, hidden], 1)
        self.conv2 = yolox_block([hidden * (1 + len(windows)), channels], 1)
        self.pools = nn.ModuleList(nn.MaxPool2d(size, 1, size // 2) for size in windows)

    def forward(self, x):
        x = self.conv1(x)
        return self.conv2(torch.cat([x, *(pool(x) for pool in self.pools)], 1))


class YoloxNano(nn.Module):
    """YOLOX-nano's CSPDarknet. Scores are the means of its outputs' channels."""

    def __init__(self, keep):
        super().__init__()
        self.stem = keep(yolox_block([12, 16], 3))
        stages = []
        for channels, count in ((16, 1), (32, 3), (64, 3), (128, 1)):
            is_last = channels == 128
            down = [keep(block) for block in separable([channels, 2 * channels], 2)]
            pyramid = [keep(Pyramid(2 * channels))] if is_last else []
            csp = keep(CspLayer(2 * channels, count, not is_last))
            stages.append(nn.Sequential(*down, *pyramid, csp))
        self.stages = nn.ModuleList(stages)

    def forward(self, x):
        pixels = (x[..., row::2, column::2] for column in (0, 1) for row in (0, 1))
        x = self.stem(torch.cat(list(pixels), 1))
        means = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index > 0:
                means.append(x.mean((2, 3)))
        return torch.cat(means, 1)


ARCHITECTURES = {
    "resnet18": lambda keep: resnet(keep, 1, (2, 2, 2, 2)),
    "resnet50": lambda keep: resnet(keep, 4, (3, 4, 6, 3)),
    "resnet101": lambda keep: resnet(keep, 4, (3, 4, 23, 3)),
    "vgg16_bn": lambda keep: vgg(keep, (2, 2, 3, 3, 3)),
    "mobilenet_v2": mobilenet_v2,
    "efficientnet_b0": efficientnet_b0,
    "densenet121": densenet121,
    "cifar_resnet18": lambda keep: resnet(keep, 1, (2, 2, 2, 2), is_small=True),
    "yolox_nano": YoloxNano,
}


def values_of(net):
    """Parameters and running statistics in the order in which Burn visits them, and whether Burn's
    layout is the transpose."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            yield module.weight, False
        elif isinstance(module, nn.Linear):
            yield module.weight, True
        elif isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                yield value, False
            continue
        else:
            continue
        if module.bias is not None:
            yield module.bias, False


# --- Devices --------------------------------------------------------------------------------


class Unavailable(Exception):
    """A lack of this machine or of PyTorch: no failure."""


def device_of(request):
    """PyTorch's device of the kind that Burn's contenders compute on."""
    name = request["device"]
    if name in ("flex", "cpu"):
        return torch.device("cpu")
    if name != "cuda":
        raise Unavailable(f"PyTorch is compared on the CPU and on CUDA alone, not on {name}")
    if not torch.cuda.is_available():
        raise Unavailable("this PyTorch finds no CUDA device")
    # f32 is f32 unless TF32 was requested. Burn may multiply it as TF32 in any case: its autotuning
    # chooses among kernels for tensor cores, too.
    is_tf32 = request["precision"] == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    torch.backends.cudnn.allow_tf32 = is_tf32
    # As Burn's autotuning: the fastest algorithm for a shape is found by trying, before timed steps.
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")


def finish(device):
    """Waits until the device has finished. The CPU always has: its calls are synchronous."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Computing:
    """Computation in a precision, with parameters in f32 in all of them."""

    # The scale of Burn's contenders. PyTorch's scaler raises it after 2000 steps.
    LOSS_SCALE = 1024.0

    def __init__(self, precision, device, is_flex):
        self.device = device
        self.half = {"f16": torch.float16, "bf16": torch.bfloat16}.get(precision)
        # Burn may multiply f32 as TF32 elsewhere than on Flex.
        self.is_coarse = self.half is not None or not is_flex
        self.scaler = None
        if precision == "f16":
            self.scaler = torch.amp.GradScaler(device.type, init_scale=self.LOSS_SCALE)
        # The layout for cuDNN's convolutions on tensor cores, by PyTorch's tuning guide.
        on_tensor_cores = device.type == "cuda" and precision != "f32"
        self.memory_format = torch.channels_last if on_tensor_cores else torch.contiguous_format

    def forward(self):
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None)

    def activations(self, tensor):
        """Activations in the blocks' type and layout."""
        tensor = tensor.to(memory_format=self.memory_format)
        return tensor if self.half is None else tensor.to(self.half)

    def module(self, module):
        """A module on the device."""
        return module.to(self.device).to(memory_format=self.memory_format)

    def backward(self, loss):
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def gradient(self, parameter):
        """A gradient of `backward`, unscaled."""
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        return parameter.grad if scale == 1.0 else parameter.grad / scale

    def step(self, optimizer):
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < self.LOSS_SCALE:
            raise Unavailable("a gradient was infinite in f16, and the optimizer's step left out")


def profile(work):
    """The kernels of one more step, the slowest first."""
    if work.device.type != "cuda":
        raise Unavailable("PyTorch's kernels are those of CUDA")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work.step()
    kernels = {}
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        kernel = kernels.setdefault(event.name, {"name": event.name, "launches": 0, "ms": 0.0})
        kernel["launches"] += 1
        kernel["ms"] += event.time_range.elapsed_us() / 1e3
    return {"kernels": sorted(kernels.values(), key=lambda kernel: -kernel["ms"])}


class Stopwatch:
    """Times the parts of a step, each to the end of its work on the device."""

    def __init__(self, device):
        self.device = device
        finish(device)
        self.started = time.perf_counter()

    def lap(self):
        """Milliseconds of the part that ends here. The next one starts."""
        finish(self.device)
        ended = time.perf_counter()
        part = ended - self.started
        self.started = ended
        return 1e3 * part


# --- Files ----------------------------------------------------------------------------------


def tensor_bytes(tensor):
    """The memory of a contiguous tensor, without a copy in the resident set and without NumPy."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr())


def read(folder, name, shape, device):
    path = Path(folder) / f"{name}.f32"
    tensor = torch.empty(shape)
    size = path.stat().st_size
    if size != 4 * tensor.numel():
        raise ValueError(f"{path} holds {size // 4} values instead of {tensor.numel()}")
    with open(path, "rb") as file:
        if file.readinto(tensor_bytes(tensor)) != size:
            raise OSError(f"{path} ended early")
    return tensor.to(device)


def fill(path, values):
    """Reads pairs as those of `values_of` from a file that holds one after the other."""
    size = 4 * sum(value.numel() for value, _ in values)
    if path.stat().st_size != size:
        raise ValueError(f"{path} holds {path.stat().st_size} bytes instead of {size}")
    with open(path, "rb") as file, torch.no_grad():
        for value, is_transposed in values:
            tensor = torch.empty(value.shape[::-1] if is_transposed else value.shape)
            if file.readinto(tensor_bytes(tensor)) != 4 * tensor.numel():
                raise OSError(f"{path} ended early")
            value.copy_(tensor.t() if is_transposed else tensor)


def write(folder, tensors):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu", torch.float32).contiguous()
        (Path(folder) / f"{name}.f32").write_bytes(tensor_bytes(tensor))


# --- Memory ---------------------------------------------------------------------------------


def status(name):
    """A size in this process's status, in bytes. None elsewhere than on Linux."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return None


def return_freed_memory():
    """Returns freed memory that the C library keeps: gradients of the warm-up, as large as the
    parameters. A step that reuses it would seem to need that much less."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def saved_bytes(forward, given):
    """Bytes that autograd keeps of a forward pass, each storage once, without those of given tensors."""
    given = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Alive to the end: a freed storage's address may be another's.
        _output = forward()
    return sum(kept.values())


def meter_of(device):
    return PoolMeter() if device.type == "cuda" else ResidentMeter()


class PoolMeter:
    """The tensors in PyTorch's pool of the GPU's memory from just before forward to the end of
    backward, above the level at its start."""

    def __init__(self):
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.base = torch.cuda.memory_allocated()
        self.end = None

    def forward_end(self):
        torch.cuda.synchronize()
        self.end = max(torch.cuda.memory_allocated() - self.base, 0)

    def finish(self):
        torch.cuda.synchronize()
        peak = max(torch.cuda.max_memory_allocated() - self.base, 0)
        return {"heap_forward_end": self.end, "heap_peak": peak}

    def whole_peak(self):
        return torch.cuda.max_memory_allocated()


class ResidentMeter:
    """The resident set from just before forward to the end of backward, above the level at its
    start."""

    def __init__(self):
        gc.collect()
        return_freed_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.peak_was_reset = True
        except OSError:
            self.peak_was_reset = False
        self.base = status("VmRSS")
        self.end = None

    def above_base(self, name):
        now = status(name)
        return None if self.base is None or now is None else max(now - self.base, 0)

    def forward_end(self):
        self.end = self.above_base("VmRSS")

    def finish(self):
        peak = self.above_base("VmHWM") if self.peak_was_reset else None
        return {"resident_forward_end": self.end, "resident_peak": peak}

    def whole_peak(self):
        return status("VmHWM")


# --- Workloads ------------------------------------------------------------------------------


def train(work, steps):
    """Training steps, and the most memory in use meanwhile. On a GPU a step before them tries cuDNN's
    algorithms."""
    if work.device.type == "cuda":
        work.step()
    meter = meter_of(work.device)
    times = [work.step() for _ in range(steps)]
    return {"steps": times, "peak_bytes": meter.whole_peak()}


class LayerWork:
    def __init__(self, layer, variant, computing, data):
        self.layer = layer
        self.variant = variant
        self.computing = computing
        if layer["dims"] == 3 and computing.memory_format == torch.channels_last:
            computing.memory_format = torch.channels_last_3d
        device = self.device = computing.device
        self.block = self.new_block(variant, data)
        self.run_block = torch.compile(self.block) if variant == "compile" else self.block
        shape = self.shape(layer["batch"], layer["channels"][0], layer["size"])
        self.input = computing.activations(read(data, "input", shape, device))
        self.input.requires_grad_(layer["input_grad"])
        reach = layer["dilation"] * (layer["kernel"] - 1)
        size = (layer["size"] + 2 * layer["padding"] - reach - 1) // layer["stride"] + 1
        shape = self.shape(layer["batch"], layer["channels"][1], size)
        self.upstream = computing.activations(read(data, "upstream", shape, device))
        self.formula = self.new_block("formula", data) if variant == "tutorial" else None

    def shape(self, batch, channels, size):
        return (batch, channels, *[size] * self.layer["dims"])

    def new_block(self, variant, data):
        layer = self.layer
        names = ("kernel", "stride", "padding", "dilation", "groups", "dims")
        geometry = {name: layer[name] for name in names}
        block = self.computing.module(block_of(variant, layer["channels"], **geometry))
        with torch.no_grad():
            block.weight.copy_(read(data, "weight", block.weight.shape, self.device))
            for module in block.modules():
                if isinstance(module, NORMS):
                    module.weight.copy_(read(data, "gamma", module.weight.shape, self.device))
                    module.bias.copy_(read(data, "beta", module.bias.shape, self.device))
        return block

    def forward(self, run_block, x):
        with self.computing.forward():
            return run_block(x)

    def forget_gradients(self):
        self.input.grad = None
        self.block.zero_grad(set_to_none=True)

    def results(self, block, run_block):
        output = self.forward(run_block, self.input)
        output.backward(self.upstream)
        results = {"output": output}
        if self.layer["input_grad"]:
            results["input_grad"] = self.input.grad
        results["weight_grad"] = block.weight.grad
        for module in block.modules():
            if isinstance(module, NORMS):
                results["gamma_grad"] = module.weight.grad
                results["beta_grad"] = module.bias.grad
        self.forget_gradients()
        return results

    def check(self, folder):
        results = self.results(self.block, self.run_block)
        write(folder, results)
        if self.formula is not None:
            write(Path(folder) / OWN_REFERENCE, self.results(self.formula, self.formula))
        return list(results)

    def step(self):
        watch = Stopwatch(self.device)
        output = self.forward(self.run_block, self.input)
        forward_ms = watch.lap()
        output.backward(self.upstream)
        backward_ms = watch.lap()
        self.forget_gradients()
        return {"forward_ms": forward_ms, "backward_ms": backward_ms}

    def warm_up(self):
        # torch.compile compiles for one shape at the first step; cuDNN tries its algorithms for one.
        if self.variant == "compile" or self.device.type == "cuda":
            self.step()
            return
        reach = self.layer["dilation"] * (self.layer["kernel"] - 1)
        shape = self.shape(SMALL_BATCH, self.layer["channels"][0], max(reach + 1, SMALL_SIZE))
        small = torch.rand(shape, device=self.device)
        small = self.computing.activations(small).requires_grad_(self.layer["input_grad"])
        output = self.forward(self.run_block, small)
        output.backward(torch.ones_like(output))
        self.forget_gradients()

    def memory(self):
        self.warm_up()
        meter = meter_of(self.device)
        output = self.forward(self.run_block, self.input)
        meter.forward_end()
        output.backward(self.upstream)
        memory = meter.finish()
        if self.variant != "checkpoint":
            given = list(self.block.parameters())
            if not self.layer["input_grad"]:
                given.append(self.input)
            run = partial(self.forward, self.run_block, self.input)
            memory["saved"] = saved_bytes(run, given)
        return memory


class TrainingWork:
    """A network's training step. Subclasses set `computing`, `device`, `variant`, `net`, `run_net`,
    `optimizer`, `images`, `targets` and what follows."""

    # From the network's output and the classes, the mean over the images.
    loss = None
    # Height and width of the images of the step that warms up before memory is measured.
    small_size = None

    def forward(self, images, targets):
        with self.computing.forward():
            return self.loss(self.run_net(images), targets)

    def step(self):
        watch = Stopwatch(self.device)
        loss = self.forward(self.images, self.targets)
        forward_ms = watch.lap()
        self.computing.backward(loss)
        backward_ms = watch.lap()
        self.computing.step(self.optimizer)
        optimizer_ms = watch.lap()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "forward_ms": forward_ms,
            "backward_ms": backward_ms,
            "optimizer_ms": optimizer_ms,
        }

    def warm_up(self):
        if self.variant == "compile" or self.device.type == "cuda":
            images, targets = self.images, self.targets
        else:
            size = self.small_size
            shape = (SMALL_BATCH, self.images.size(1), size, size)
            images = self.computing.activations(torch.rand(shape, device=self.device))
            targets = torch.zeros(SMALL_BATCH, dtype=torch.long, device=self.device)
        self.computing.backward(self.forward(images, targets))
        self.net.zero_grad(set_to_none=True)

    def memory(self):
        self.warm_up()
        meter = meter_of(self.device)
        loss = self.forward(self.images, self.targets)
        meter.forward_end()
        self.computing.backward(loss)
        # Without the optimizer: the activations are gone by then, and its state stays.
        memory = meter.finish()
        # Hooks do not see what a checkpoint keeps.
        if self.variant != "checkpoint":
            given = [*self.net.parameters(), *self.net.buffers(), self.images, self.targets]
            run = partial(self.forward, self.images, self.targets)
            memory["saved"] = saved_bytes(run, given)
        return memory


class NetworkWork(TrainingWork):
    """The tutorial's network, with its optimizer."""

    loss = staticmethod(F.nll_loss)
    small_size = 28

    def __init__(self, network, variant, computing, data):
        self.variant = variant
        self.computing = computing
        device = self.device = computing.device
        self.data = data
        self.net = self.new_net(variant)
        self.run_net = torch.compile(self.net) if variant == "compile" else self.net
        self.optimizer = torch.optim.Adadelta(self.net.parameters(), lr=1.0)
        batch = network["batch"]
        self.images = computing.activations(read(data, "images", (batch, 1, 28, 28), device))
        self.targets = read(data, "targets", (batch,), device).long()

    def new_net(self, variant):
        net = self.computing.module(Net(variant))
        with torch.no_grad():
            for name, parameter, is_transposed in self.parameters(net):
                shape = parameter.shape[::-1] if is_transposed else parameter.shape
                value = read(self.data, name, shape, self.device)
                parameter.copy_(value.t() if is_transposed else value)
        return net

    @staticmethod
    def parameters(net):
        """Name, parameter, and whether Burn's layout is the transpose."""
        yield "conv1.weight", net.conv1.weight, False
        yield "conv2.weight", net.conv2.weight, False
        for name, linear in (("fc1", net.fc1), ("fc2", net.fc2)):
            yield f"{name}.weight", linear.weight, True
            yield f"{name}.bias", linear.bias, False

    def results(self, net, run_net):
        net.dropout.eval()
        with self.computing.forward():
            log_probabilities = run_net(self.images)
            loss = self.loss(log_probabilities, self.targets)
        self.computing.backward(loss)
        net.dropout.train()
        results = {"log_probabilities": log_probabilities, "loss": loss}
        for name, parameter, is_transposed in self.parameters(net):
            grad = self.computing.gradient(parameter)
            grad = grad.t() if is_transposed else grad
            results[f"{name}_grad"] = grad
        net.zero_grad(set_to_none=True)
        return results

    def check(self, folder):
        results = self.results(self.net, self.run_net)
        write(folder, results)
        if self.variant == "tutorial":
            formula = self.new_net("formula")
            write(Path(folder) / OWN_REFERENCE, self.results(formula, formula))
        return list(results)


class ClassifierWork(TrainingWork):
    """A network of three-channel images, with momentum as in Burn's contenders."""

    loss = staticmethod(F.cross_entropy)
    small_size = SMALL_CLASSIFIER_SIZE

    def __init__(self, classifier, variant, computing, data):
        if variant == "tutorial":
            raise Unavailable(
                "the tutorial's function has no scale and shift, no running statistics and no "
                "residual, which this network has"
            )
        self.variant = variant
        self.computing = computing
        device = self.device = computing.device
        # Without drawing what the file holds.
        with torch.device("meta"):
            net = ARCHITECTURES[classifier["architecture"]](keeper_of(variant))
        self.net = computing.module(net.to_empty(device=device))
        fill(Path(data) / "parameters.f32", list(values_of(self.net)))
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked.zero_()
        self.run_net = torch.compile(self.net) if variant == "compile" else self.net
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=1e-3, momentum=0.9, dampening=0.1
        )
        batch, size = classifier["batch"], classifier["size"]
        self.images = computing.activations(read(data, "images", (batch, 3, size, size), device))
        self.targets = read(data, "targets", (batch,), device).long()

    def check(self, folder):
        with self.computing.forward():
            logits = self.run_net(self.images)
            loss = self.loss(logits, self.targets)
        self.computing.backward(loss)
        trained = (value for value, _ in values_of(self.net) if value.requires_grad)
        grads = [self.computing.gradient(value) for value in trained]
        vectors = [grad for grad in grads if grad.ndim == 1]
        if self.computing.is_coarse:
            vectors = [grad.norm()[None] for grad in vectors]
        results = {
            "logits": logits,
            "loss": loss,
            # As Burn's contenders, with the reasons.
            "norms_and_biases_grad": torch.cat(vectors),
            "weight_grad_norms": torch.stack([grad.norm() for grad in grads if grad.ndim > 1]),
        }
        self.net.zero_grad(set_to_none=True)
        write(folder, results)
        return list(results)


# --- Requests -------------------------------------------------------------------------------


class Session:
    def __init__(self):
        self.work = None

    def answer(self, name, request):
        if name == "hello":
            versions = {"torch": torch.__version__, "python": platform.python_version()}
            vectors = torch.backends.cpu.get_cpu_capability()
            return {"hello": {"versions": versions, "vectors": vectors}}
        if name == "load":
            torch.set_num_threads(request["threads"])
            torch.manual_seed(0)
            ((kind, shape),) = request["entry"]["work"].items()
            works = {
                "layer": LayerWork,
                "network": NetworkWork,
                "classifier": ClassifierWork,
            }
            work = works[kind]
            self.work = work(
                shape, variant_of(request), computing_of(request), request["data_dir"]
            )
            return {"done": {}}
        if name == "check":
            tensors = self.work.check(request["dir"])
            own = self.work.variant == "tutorial"
            return {"checked": {"tensors": tensors, "own_reference": own}}
        if name == "run":
            return {"ran": self.work.step()}
        if name == "profile":
            return {"profiled": profile(self.work)}
        if name == "memory":
            return {"measured": self.work.memory()}
        if name == "train":
            return {"trained": train(self.work, request["steps"])}
        raise ValueError(f"{name} is not a request to PyTorch")

    def explain(self, error):
        """An error as a reply; a compiler that is missing is no failure."""
        if isinstance(error, Unavailable):
            return {"unavailable": {"reason": str(error)}}
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        reason = reason.split(" Set TORCHDYNAMO_VERBOSE")[0][:400]
        compiling = self.work is not None and self.work.variant == "compile"
        by_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        kind = "unavailable" if compiling and by_compiler else "failed"
        return {kind: {"reason": reason}}


def computing_of(request):
    precision = request["precision"]
    if precision not in ("f32", "tf32", "f16", "bf16"):
        raise ValueError(f"{precision} is not one of PyTorch's precisions")
    computing = Computing(precision, device_of(request), request["device"] == "flex")
    if request["variant"] == "tutorial" and computing.half is not None:
        raise Unavailable(
            "the tutorial's function is not written for mixed precision: its backward pass gets an "
            f"input in {precision} and a weight in f32"
        )
    return computing


def variant_of(request):
    variant = request["variant"]
    if variant not in ("eager", "compile", "tutorial", "checkpoint"):
        raise ValueError(f"{variant} is not one of PyTorch's contenders")
    return variant


def main():
    if sys.byteorder != "little":
        sys.exit("tensors are little-endian files, and this machine is not")
    session = Session()
    for line in sys.stdin:
        ((name, request),) = json.loads(line).items()
        try:
            message = session.answer(name, request)
        except Exception as error:
            message = session.explain(error)
        reply(message)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
