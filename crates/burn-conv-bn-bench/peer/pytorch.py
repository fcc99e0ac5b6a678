#!/usr/bin/env python3
"""PyTorch's contenders of `cargo xtask bench`: one of them in a process of its own.

Not for people: `cargo xtask bench --peer pytorch` starts it, writes a request a line to its
standard input, and reads a reply a line from its standard output. Requests and replies are those
of `src/protocol.rs` beside this folder; tensors are files of raw little-endian f32. Nothing but
torch is needed.

Contenders of a layer (conv -> batch norm -> ReLU) and of the tutorial's network:

eager       PyTorch's own layers.
compile     The same through torch.compile.
tutorial    The custom function of the tutorial "Fusing Convolution and Batch Norm using Custom
            Function", with stride, padding and groups added. Its norm is another than everybody
            else's and has no scale and shift, so it is checked against its own formula.
checkpoint  PyTorch's own layers, each block under torch.utils.checkpoint.
"""

import ctypes
import gc
import json
import os
import platform
import sys
import time
from pathlib import Path

# Standard output carries replies alone. Whatever else is printed goes to standard error.
REPLIES = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def reply(message):
    REPLIES.write(json.dumps(message) + "\n")
    REPLIES.flush()


# torch.compile's pool of compiling processes would outlive this one and disturb the others.
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
LEARNING_RATE = 1.0
IMAGE_SIZE = 28
# Images, and least height and width, of the step that warms up before memory is measured.
SMALL_BATCH, SMALL_SIZE = 2, 8


# --- The tutorial's functions ---------------------------------------------------------------
#
# Copied from it, but for the geometry: it has stride 1, no padding and one group alone. That case
# still takes its own formulae.


def is_unit(stride, padding, groups):
    return (stride, padding, groups) == (1, 0, 1)


def convolution_backward(grad_out, X, weight, stride, padding, groups, needs_X):
    if is_unit(stride, padding, groups):
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
        [1, 1],
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
    def forward(ctx, X, conv_weight, stride, padding, groups, eps):
        assert X.ndim == 4
        ctx.save_for_backward(X, conv_weight)
        ctx.geometry = (stride, padding, groups)
        X = F.conv2d(X, conv_weight, None, stride, padding, 1, groups)
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
        stride, padding, groups = ctx.geometry
        X_conv_out = F.conv2d(X, conv_weight, None, stride, padding, 1, groups)
        grad_out = batch_norm_backward(
            grad_out, X_conv_out, ctx.sum, ctx.sqrt_var, ctx.N, ctx.eps
        )
        needs_X = ctx.needs_input_grad[0]
        grad_X, grad_weight = convolution_backward(
            grad_out, X, conv_weight, stride, padding, groups, needs_X
        )
        return grad_X, grad_weight, None, None, None, None


# --- Blocks ---------------------------------------------------------------------------------


class Block(nn.Module):
    """PyTorch's own conv -> batch norm -> ReLU."""

    def __init__(self, channels, kernel, stride=1, padding=0, groups=1, affine=True):
        super().__init__()
        self.conv = nn.Conv2d(
            *channels, kernel, stride=stride, padding=padding, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(
            channels[1], eps=EPSILON, affine=affine, track_running_stats=affine
        )

    @property
    def weight(self):
        return self.conv.weight

    def forward(self, x):
        return F.relu_(self.norm(self.conv(x)))


class TutorialBlock(nn.Module):
    """The tutorial's custom function, and ReLU in place as in its network."""

    def __init__(self, channels, kernel, stride=1, padding=0, groups=1, affine=True):
        super().__init__()
        self.geometry = (stride, padding, groups)
        shape = (channels[1], channels[0] // groups, kernel, kernel)
        self.weight = nn.Parameter(torch.empty(shape))
        self.eps = 1e-3

    def forward(self, x):
        return F.relu_(FusedConvBN2DFunction.apply(x, self.weight, *self.geometry, self.eps))


class TutorialFormula(TutorialBlock):
    """The same by PyTorch's own differentiation."""

    def forward(self, x):
        stride, padding, groups = self.geometry
        x = F.conv2d(x, self.weight, None, stride, padding, 1, groups)
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


def block_of(variant, *args, **kwargs):
    if variant == "tutorial":
        return TutorialBlock(*args, **kwargs)
    if variant == "formula":
        return TutorialFormula(*args, **kwargs)
    block = Block(*args, **kwargs)
    return Checkpointed(block) if variant == "checkpoint" else block


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


# --- Devices --------------------------------------------------------------------------------


class Unavailable(Exception):
    """What this machine, or PyTorch, has not: nobody's fault."""


def device_of(request):
    """PyTorch's device of the kind that Burn's contenders compute on."""
    name = request["device"]
    if name in ("flex", "cpu"):
        return torch.device("cpu")
    if name != "cuda":
        raise Unavailable(f"PyTorch is compared on the CPU and on CUDA alone, not on {name}")
    if not torch.cuda.is_available():
        raise Unavailable("this PyTorch finds no CUDA device")
    # So that f32 is f32. Burn does not insist: some of the kernels that its autotuning chooses from
    # multiply f32 as TF32 where there are tensor cores.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # As Burn's autotuning: the fastest algorithm for a shape is found by trying, before anything
    # is timed.
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")


def finish(device):
    """Waits until the device has done what it was told to. The CPU has when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()


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
    """The memory of a contiguous tensor. Nothing is copied, so nothing is left behind in the
    resident set, and NumPy need not be there."""
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


class ResidentMeter:
    """The resident set from just before forward to the end of backward, above the level at its
    start."""

    def __init__(self):
        gc.collect()
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


# --- Workloads ------------------------------------------------------------------------------


class LayerWork:
    def __init__(self, layer, variant, device, data):
        self.layer = layer
        self.variant = variant
        self.device = device
        self.block = self.new_block(variant, data)
        self.run_block = torch.compile(self.block) if variant == "compile" else self.block
        size = layer["size"]
        shape = (layer["batch"], layer["channels"][0], size, size)
        self.input = read(data, "input", shape, device).requires_grad_(layer["input_grad"])
        size = (size + 2 * layer["padding"] - layer["kernel"]) // layer["stride"] + 1
        shape = (layer["batch"], layer["channels"][1], size, size)
        self.upstream = read(data, "upstream", shape, device)
        self.formula = self.new_block("formula", data) if variant == "tutorial" else None

    def new_block(self, variant, data):
        layer = self.layer
        geometry = {name: layer[name] for name in ("kernel", "stride", "padding", "groups")}
        block = block_of(variant, layer["channels"], **geometry).to(self.device)
        with torch.no_grad():
            block.weight.copy_(read(data, "weight", block.weight.shape, self.device))
            for module in block.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.copy_(read(data, "gamma", module.weight.shape, self.device))
                    module.bias.copy_(read(data, "beta", module.bias.shape, self.device))
        return block

    def forget_gradients(self):
        self.input.grad = None
        self.block.zero_grad(set_to_none=True)

    def results(self, block, run_block):
        output = run_block(self.input)
        output.backward(self.upstream)
        results = {"output": output}
        if self.layer["input_grad"]:
            results["input_grad"] = self.input.grad
        results["weight_grad"] = block.weight.grad
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
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
        output = self.run_block(self.input)
        forward_ms = watch.lap()
        output.backward(self.upstream)
        backward_ms = watch.lap()
        self.forget_gradients()
        return {"forward_ms": forward_ms, "backward_ms": backward_ms}

    def warm_up(self):
        # What is compiled is compiled for one shape, during its first step, and cuDNN tries its
        # algorithms for one.
        if self.variant == "compile" or self.device.type == "cuda":
            self.step()
            return
        size = max(self.layer["kernel"], SMALL_SIZE)
        small = torch.rand(SMALL_BATCH, self.layer["channels"][0], size, size, device=self.device)
        output = self.run_block(small.requires_grad_(self.layer["input_grad"]))
        output.backward(torch.ones_like(output))
        self.forget_gradients()

    def memory(self):
        self.warm_up()
        meter = meter_of(self.device)
        output = self.run_block(self.input)
        meter.forward_end()
        output.backward(self.upstream)
        return meter.finish()


class NetworkWork:
    def __init__(self, network, variant, device, data):
        self.variant = variant
        self.device = device
        self.data = data
        self.net = self.new_net(variant)
        self.run_net = torch.compile(self.net) if variant == "compile" else self.net
        self.optimizer = torch.optim.Adadelta(self.net.parameters(), lr=LEARNING_RATE)
        batch = network["batch"]
        self.images = read(data, "images", (batch, 1, IMAGE_SIZE, IMAGE_SIZE), device)
        self.targets = read(data, "targets", (batch,), device).long()

    def new_net(self, variant):
        net = Net(variant).to(self.device)
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

    def forward(self, run_net, images, targets):
        return F.nll_loss(run_net(images), targets)

    def results(self, net, run_net):
        net.dropout.eval()
        log_probabilities = run_net(self.images)
        loss = F.nll_loss(log_probabilities, self.targets)
        loss.backward()
        net.dropout.train()
        results = {"log_probabilities": log_probabilities, "loss": loss}
        for name, parameter, is_transposed in self.parameters(net):
            grad = parameter.grad.t() if is_transposed else parameter.grad
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

    def step(self):
        watch = Stopwatch(self.device)
        loss = self.forward(self.run_net, self.images, self.targets)
        forward_ms = watch.lap()
        loss.backward()
        backward_ms = watch.lap()
        self.optimizer.step()
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
            images = torch.rand(SMALL_BATCH, 1, IMAGE_SIZE, IMAGE_SIZE, device=self.device)
            targets = torch.zeros(SMALL_BATCH, dtype=torch.long, device=self.device)
        self.forward(self.run_net, images, targets).backward()
        self.net.zero_grad(set_to_none=True)

    def memory(self):
        self.warm_up()
        meter = meter_of(self.device)
        loss = self.forward(self.run_net, self.images, self.targets)
        meter.forward_end()
        loss.backward()
        # Without the optimizer: by then the activations are gone, and its state stays.
        return meter.finish()


# --- Requests -------------------------------------------------------------------------------


class Session:
    def __init__(self):
        self.work = None

    def answer(self, name, request):
        if name == "hello":
            versions = {"torch": torch.__version__, "python": platform.python_version()}
            return {"hello": {"versions": versions}}
        if name == "load":
            torch.set_num_threads(request["threads"])
            torch.manual_seed(0)
            ((kind, shape),) = request["entry"]["work"].items()
            works = {"layer": LayerWork, "network": NetworkWork}
            if kind not in works:
                raise Unavailable("torchvision's networks are not compared with PyTorch yet")
            work = works[kind]
            self.work = work(
                shape, variant_of(request), device_of(request), request["data_dir"]
            )
            return {"done": {}}
        if name == "check":
            tensors = self.work.check(request["dir"])
            own = self.work.variant == "tutorial"
            return {"checked": {"tensors": tensors, "own_reference": own}}
        if name == "run":
            return {"ran": self.work.step()}
        if name == "memory":
            return {"measured": self.work.memory()}
        raise ValueError(f"{name} is not a request to PyTorch")

    def explain(self, error):
        """An error as a reply: that nothing can be compiled here is nobody's fault."""
        if isinstance(error, Unavailable):
            return {"unavailable": {"reason": str(error)}}
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        reason = reason.split(" Set TORCHDYNAMO_VERBOSE")[0][:400]
        compiling = self.work is not None and self.work.variant == "compile"
        by_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        kind = "unavailable" if compiling and by_compiler else "failed"
        return {kind: {"reason": reason}}


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
