#!/usr/bin/env python3
"""Write the values PyTorch computes, for the Rust tests to compare with.

    python scripts/pytorch_reference.py            # into the repository this file is in
    python scripts/pytorch_reference.py --out DIR  # into another tree

Three JSON files, each read by tests of the crate it lies in. Everything is computed in
float64 from fixed seeds, and every number is written so that reading it back gives the same
float64 (serde_json needs its feature `float_roundtrip` for the last bit). Inputs are rounded
to four decimals: exact in the file, and short.

crates/burn-conv-bn/tests/data/pytorch_conv_bn.json
    Small and ugly conv + batch norm (+ residual) (+ ReLU) cases. The tests build the layer
    from `options` and `tensors`, run it forward, run it backward from `upstream`, and compare
    with `results`. Cases of norm "batch_norm" come from torch.nn.Conv{1,2,3}d and
    torch.nn.BatchNorm{1,2,3}d; cases of norm "tutorial" from the tutorial's formula
    `(z - mean) / (sqrt(unbiased var) + eps)`, and the first one from the tutorial's own
    FusedConvBN2DFunction. In mode "frozen" the norm is in evaluation mode and running_mean
    and running_var are inputs.

crates/burn-conv-bn-models/tests/data/pytorch_adadelta.json
    Two runs of torch.optim.Adadelta on given gradients. The tests feed the same gradients to
    the crate's optimizer and compare the parameters and both accumulators after each step.

crates/burn-conv-bn-models/tests/data/pytorch_net.json
    The tutorial's network with few channels and without dropout, in both norm variants. The
    tests load the weights and compare log-probabilities, loss and gradients. Linear weights
    are in PyTorch's layout, [out, in]; Burn's is [in, out].

Nothing is written unless gradcheck (finite differences) agrees with every gradient of the
layer and the network; the two cases marked `gradcheck=False` are beyond finite differences.
No value in front of a ReLU is so near to zero that rounding could flip its mask, save those
that are exactly beta because gamma is 0.
"""

import argparse
import json
import zlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

MOMENTUM = 0.1
# The least distance to a ReLU's kink, or between the two best of a max pool's window.
MARGIN = 2e-5


# --- The tutorial's functions, copied from it -----------------------------------------------


def convolution_backward(grad_out, X, weight):
    grad_input = F.conv2d(X.transpose(0, 1), grad_out.transpose(0, 1)).transpose(0, 1)
    grad_X = F.conv_transpose2d(grad_out, weight)
    return grad_X, grad_input


class Conv2D(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, weight):
        ctx.save_for_backward(X, weight)
        return F.conv2d(X, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        X, weight = ctx.saved_tensors
        return convolution_backward(grad_out, X, weight)


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


class BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, eps=1e-3):
        sum = X.sum(dim=(0, 2, 3))
        var = X.var(unbiased=True, dim=(0, 2, 3))
        N = X.numel() / X.size(1)
        sqrt_var = torch.sqrt(var)
        ctx.save_for_backward(X)
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
        (X,) = ctx.saved_tensors
        return batch_norm_backward(grad_out, X, ctx.sum, ctx.sqrt_var, ctx.N, ctx.eps), None


class FusedConvBN2DFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, conv_weight, eps=1e-3):
        assert X.ndim == 4  # N, C, H, W
        ctx.save_for_backward(X, conv_weight)
        X = F.conv2d(X, conv_weight)
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
    def backward(ctx, grad_out):
        X, conv_weight = ctx.saved_tensors
        X_conv_out = F.conv2d(X, conv_weight)
        grad_out = batch_norm_backward(
            grad_out, X_conv_out, ctx.sum, ctx.sqrt_var, ctx.N, ctx.eps
        )
        grad_X, grad_input = convolution_backward(grad_out, X, conv_weight)
        return grad_X, grad_input, None


def check_tutorial_functions():
    """The tutorial's own three checks, with its shapes."""
    torch.manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, requires_grad=True)

    weight = rand(5, 3, 3, 3)
    assert torch.autograd.gradcheck(Conv2D.apply, (rand(10, 3, 7, 7), weight))
    assert torch.autograd.gradcheck(BatchNorm.apply, (rand(1, 2, 3, 4),), fast_mode=False)
    assert torch.autograd.gradcheck(FusedConvBN2DFunction.apply, (rand(2, 3, 4, 4), weight))


# --- conv + batch norm (+ residual) (+ ReLU) ------------------------------------------------


def per_channel(t, like):
    """[C] as [1, C, 1, ...], to broadcast with an activation."""
    return t.view(1, -1, *[1] * (like.ndim - 2))


def convolve(tensors, options):
    """torch.nn.ConvNd; padding that differs at the two ends is torch.nn.functional.pad's."""
    x, weight = tensors["x"], tensors["weight"]
    padding = options["padding"]
    dims = len(padding)
    conv_padding = [begin for begin, _ in padding]
    if any(begin != end for begin, end in padding):
        # F.pad takes the last dimension first.
        x = F.pad(x, [p for pair in reversed(padding) for p in pair])
        conv_padding = [0] * dims
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](
        x.shape[1], weight.shape[0], tuple(weight.shape[2:]),
        stride=tuple(options["stride"]), padding=tuple(conv_padding),
        dilation=tuple(options["dilation"]), groups=options["groups"],
        bias=options["has_bias"],
    )  # fmt: skip
    parameters = {"weight": weight}
    if options["has_bias"]:
        parameters["bias"] = tensors["bias"]
    return torch.func.functional_call(conv, parameters, x)


def batch_norm(z, tensors, options, running, training):
    """torch.nn.BatchNormNd. Updates `running` in place when training."""
    norm = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][z.ndim - 3](
        z.shape[1], eps=options["epsilon"], momentum=MOMENTUM, affine=options["affine"]
    ).train(training)
    state = dict(running)
    if options["affine"]:
        state["weight"], state["bias"] = tensors["gamma"], tensors["beta"]
    return torch.func.functional_call(norm, state, z)


def tutorial_norm(z, tensors, options, running, training):
    """The tutorial's formula, for any dimension and with the usual affine parameters."""
    if training:
        reduced = [d for d in range(z.ndim) if d != 1]
        mean, var = z.mean(dim=reduced), z.var(dim=reduced, unbiased=True)
        with torch.no_grad():
            running["running_mean"].lerp_(mean, MOMENTUM)
            running["running_var"].lerp_(var, MOMENTUM)
    else:
        mean, var = running["running_mean"], running["running_var"]
    y = (z - per_channel(mean, z)) / per_channel(torch.sqrt(var) + options["epsilon"], z)
    if options["affine"]:
        y = y * per_channel(tensors["gamma"], z) + per_channel(tensors["beta"], z)
    return y


def forward(tensors, options, running, training):
    """Returns the output, what the activation sees, and the convolution's output."""
    z = convolve(tensors, options)
    norm = {"batch_norm": batch_norm, "tutorial": tutorial_norm}[options["norm"]]
    y = norm(z, tensors, options, running, training)
    if options["residual"]:
        y = y + tensors["residual"]
    output = F.relu(y) if options["activation"] == "relu" else y
    return output, y, z


def case(name, x, weight, *, frozen=False, stride=1, padding=0, dilation=1, groups=1,
         epsilon=1e-5, norm="batch_norm", activation="identity", bias=False, affine=False,
         residual=False, gamma=None, beta=None, values=None, by_function=False,
         gradcheck=True):  # fmt: skip
    """One case. `x` and `weight` are shapes. `gamma`, `beta` and `bias` may give values, and
    `values` (a function of the tensors) may change what was drawn."""
    dims = len(x) - 2

    def each(value):
        return list(value) if isinstance(value, (list, tuple)) else [value] * dims

    options = {
        "stride": each(stride),
        "padding": [list(p) if isinstance(p, tuple) else [p, p] for p in each(padding)],
        "dilation": each(dilation),
        "groups": groups,
        "epsilon": epsilon,
        "norm": norm,
        "activation": activation,
        "has_bias": bias is not False,
        "affine": affine,
        "residual": residual,
    }
    # A seed that keeps clear of ReLU's kink: the first of the name's own sequence.
    for attempt in range(1000):
        torch.manual_seed(zlib.crc32(name.encode()) + attempt)
        tensors, running = draw(x, weight, options, frozen, by_function)
        for key, given in (("bias", bias), ("gamma", gamma), ("beta", beta)):
            if isinstance(given, list):
                tensors[key] = torch.tensor(given)
        if values is not None:
            values(tensors)
        result, clear = evaluate(tensors, options, running, frozen, by_function, gradcheck)
        if clear:
            break
    else:
        raise AssertionError(f"{name}: every seed comes too near to the kink")
    if frozen:
        tensors |= running
    return {
        "name": name,
        "mode": "frozen" if frozen else "train",
        "options": options,
        "tensors": {key: tensor_json(t) for key, t in tensors.items()},
        "results": {key: tensor_json(t) for key, t in result.items()},
    }


def draw(x_shape, weight_shape, options, frozen, uniform):
    """Random inputs, rounded to four decimals."""

    def rounded(t):
        return torch.round(t, decimals=4)

    channels = weight_shape[0]
    if uniform:  # as in the tutorial
        x, weight = torch.rand(x_shape), torch.rand(weight_shape)
    else:
        x, weight = torch.randn(x_shape), torch.randn(weight_shape) / 2
    tensors = {"x": rounded(x), "weight": rounded(weight)}
    if options["has_bias"]:
        tensors["bias"] = rounded(torch.randn(channels))
    if options["affine"]:
        tensors["gamma"] = rounded(0.5 + torch.rand(channels))
        tensors["beta"] = rounded(torch.randn(channels) / 2)
    output_shape = convolve(tensors, options).shape
    if options["residual"]:
        tensors["residual"] = rounded(torch.randn(output_shape))
    tensors["upstream"] = rounded(torch.randn(output_shape))
    running = {"running_mean": torch.zeros(channels), "running_var": torch.ones(channels)}
    if frozen:
        running["running_mean"] = rounded(torch.randn(channels) / 2)
        running["running_var"] = rounded(0.25 + torch.rand(channels) * 2)
    return tensors, running


def evaluate(tensors, options, running, frozen, by_function, gradcheck):
    """Results of one case, and whether the values before the ReLU keep their distance."""
    given = {k: t.clone().requires_grad_() for k, t in tensors.items() if k != "upstream"}
    stepped = {k: t.clone() for k, t in running.items()}
    output, preactivation, z = forward(given, options, stepped, not frozen)

    if options["activation"] == "relu":
        # Where gamma is 0 and nothing is added, the value is beta, whatever the rounding.
        at_risk = preactivation.detach().abs()
        if options["affine"] and not options["residual"]:
            at_risk = at_risk[:, tensors["gamma"] != 0]
        if at_risk.numel() and at_risk.min() < MARGIN:
            return None, False

    if by_function:
        composed = output
        output = FusedConvBN2DFunction.apply(given["x"], given["weight"], options["epsilon"])
        assert torch.allclose(output, composed, rtol=1e-12, atol=1e-12)

    grads = torch.autograd.grad(output, list(given.values()), tensors["upstream"])
    results = {"output": output}
    results |= {f"grad_{key}": grad for key, grad in zip(given, grads)}
    if not frozen:
        reduced = [d for d in range(z.ndim) if d != 1]
        results["mean"] = z.mean(dim=reduced)
        results["variance_biased"] = z.var(dim=reduced, unbiased=False)
        results["running_mean"] = stepped["running_mean"]
        results["running_var_unbiased"] = stepped["running_var"]
        m = z.numel() // z.shape[1]
        expected = 1 - MOMENTUM + MOMENTUM * results["variance_biased"] * m / (m - 1)
        assert torch.allclose(results["running_var_unbiased"], expected, rtol=1e-12)

    if gradcheck:

        def function(*inputs):
            scratch = {k: t.clone() for k, t in running.items()}
            return forward(dict(zip(given, inputs)), options, scratch, not frozen)[0]

        assert torch.autograd.gradcheck(function, tuple(given.values()))
    return {key: t.detach() for key, t in results.items()}, True


def conv_bn_cases():
    relu = {"activation": "relu"}
    tutorial = {"norm": "tutorial", "epsilon": 1e-3}

    def zero_channel(tensors):
        tensors["weight"][1] = 0.0

    def small_deviation(tensors):
        tensors["x"] = torch.round(tensors["x"] / 100, decimals=4)

    return [
        # The tutorial's function itself, on its own shapes.
        case("tutorial_function", [2, 3, 4, 4], [5, 3, 3, 3], by_function=True, **tutorial),
        # Kernels, strides, paddings, dilations.
        case("k3_p1_relu", [2, 2, 4, 3], [3, 2, 3, 3], padding=1, affine=True, **relu),
        case("k3_p1_relu_plain", [2, 2, 3, 3], [2, 2, 3, 3], padding=1, **relu),
        case("k3_p1_relu_tutorial", [2, 2, 3, 4], [3, 2, 3, 3], padding=1, affine=True,
             **relu, **tutorial),
        case("stride2_asymmetric_padding", [2, 2, 5, 6], [3, 2, 3, 3], stride=2,
             padding=[(1, 0), (0, 2)]),
        case("stride21_k23_asymmetric_padding_tutorial", [2, 2, 5, 4], [3, 2, 2, 3],
             stride=[2, 1], padding=[(0, 1), (2, 1)], affine=True, **relu, **tutorial),
        case("stride3_leaves_a_rest", [2, 1, 8, 7], [2, 1, 2, 3], stride=[3, 2], affine=True,
             **relu),
        case("k2_same", [2, 2, 4, 3], [3, 2, 2, 2], padding=[(0, 1), (0, 1)], **relu),
        case("dilation2", [2, 2, 5, 6], [2, 2, 3, 3], padding=1, dilation=2, affine=True,
             **relu),
        case("dilation13_stride2_tutorial", [2, 1, 5, 8], [2, 1, 3, 3], padding=[1, (2, 1)],
             dilation=[1, 3], stride=2, bias=True, **tutorial),
        # Groups, depthwise, pointwise.
        case("groups2", [2, 4, 3, 3], [4, 2, 3, 3], padding=1, groups=2, affine=True, **relu),
        case("groups3_tutorial_everything", [2, 3, 3, 4], [6, 1, 3, 3], padding=[(1, 0), 1],
             stride=[1, 2], groups=3, bias=True, affine=True, residual=True, **relu,
             **tutorial),
        case("depthwise", [2, 5, 3, 3], [5, 1, 3, 3], padding=1, groups=5, affine=True,
             **relu),
        case("depthwise_multiplier2_stride2", [2, 3, 4, 4], [6, 1, 2, 2], stride=2, groups=3),
        case("pointwise", [2, 5, 3, 2], [7, 5, 1, 1], affine=True, **relu),
        case("pointwise_stride2", [2, 3, 5, 4], [4, 3, 1, 1], stride=2, **relu),
        # Parameters.
        case("bias", [2, 2, 4, 4], [3, 2, 3, 3], bias=True, **relu),
        case("bias_affine_tutorial", [2, 2, 4, 4], [3, 2, 3, 3], bias=True, affine=True,
             **tutorial),
        case("gamma_zero_and_negative", [2, 2, 4, 4], [5, 2, 3, 3], affine=True,
             gamma=[0.0, -1.25, 0.75, 0.0, -0.001], beta=[0.5, 0.25, -0.25, -0.5, 0.002],
             **relu),
        case("gamma_zero_and_negative_tutorial", [2, 2, 4, 4], [5, 2, 3, 3], affine=True,
             gamma=[0.0, -1.25, 0.75, 0.0, -0.001], beta=[0.5, 0.25, -0.25, -0.5, 0.002],
             **relu, **tutorial),
        # Channel 1 sits on the kink: PyTorch's derivative there is 0.
        case("gamma_and_beta_zero", [2, 2, 3, 3], [3, 2, 2, 2], affine=True,
             gamma=[1.0, 0.0, -0.5], beta=[0.25, 0.0, 0.125], gradcheck=False, **relu),
        case("residual", [2, 2, 3, 4], [3, 2, 3, 3], padding=1, affine=True, residual=True,
             **relu),
        case("residual_identity", [2, 2, 3, 4], [3, 2, 2, 2], residual=True),
        case("residual_zero_init", [2, 2, 4, 4], [3, 2, 3, 3], affine=True, residual=True,
             gamma=[0.0, 0.0, 0.0], beta=[0.0, 0.0, 0.0], **relu),
        case("residual_tutorial", [2, 2, 4, 4], [3, 2, 3, 3], bias=True, residual=True, **relu,
             **tutorial),
        # Shapes.
        case("one_channel", [2, 1, 4, 5], [1, 1, 3, 3], padding=1, affine=True, **relu),
        case("seven_channels", [2, 3, 4, 3], [7, 3, 2, 2], affine=True, **relu),
        case("batch1", [1, 3, 5, 4], [4, 3, 3, 3], padding=[(1, 0), (0, 0)], affine=True,
             **relu),
        case("batch1_tutorial", [1, 3, 5, 4], [4, 3, 3, 3], **tutorial),
        case("map_1x1", [5, 2, 3, 3], [3, 2, 3, 3], affine=True, **relu),
        case("m2_two_images", [2, 3, 2, 2], [4, 3, 2, 2], bias=True, affine=True, **relu),
        case("m2_one_image", [1, 3, 2, 3], [4, 3, 2, 2], epsilon=0.1, affine=True, **relu),
        case("m2_tutorial", [2, 3, 2, 2], [4, 3, 2, 2], affine=True, **relu, **tutorial),
        # Values. In the first, channel 1's variance is 0. In the second, every channel's mean
        # is about 1e5 standard deviations.
        case("zero_variance", [2, 2, 4, 4], [3, 2, 3, 3], affine=True, values=zero_channel,
             **relu),
        case("large_mean", [2, 2, 4, 4], [3, 2, 3, 3], bias=[1000.0, -1000.0, 2000.0],
             affine=True, values=small_deviation, gradcheck=False, **relu),
        # One and three dimensions.
        case("conv1d", [3, 4, 9], [6, 2, 3], stride=2, padding=[(2, 1)], dilation=2, groups=2,
             affine=True, **relu),
        case("conv1d_tutorial", [2, 2, 7], [3, 2, 3], padding=1, bias=True, affine=True,
             residual=True, **relu, **tutorial),
        case("conv3d", [2, 1, 3, 4, 3], [3, 1, 2, 3, 2], stride=[1, 2, 1],
             padding=[0, (1, 1), (1, 0)], affine=True, **relu),
        case("conv3d_tutorial", [1, 2, 3, 3, 4], [2, 1, 2, 2, 2], groups=2, affine=True, **relu,
             **tutorial),
        # Frozen statistics.
        case("frozen", [2, 2, 4, 3], [3, 2, 3, 3], padding=1, frozen=True, bias=True,
             affine=True, **relu),
        case("frozen_plain", [2, 2, 4, 4], [3, 2, 3, 3], frozen=True),
        case("frozen_tutorial", [2, 2, 4, 4], [3, 2, 3, 3], frozen=True, bias=True, affine=True,
             **relu, **tutorial),
        case("frozen_options", [1, 4, 5, 6], [4, 2, 3, 3], frozen=True, stride=[2, 1],
             padding=[(1, 0), (0, 2)], dilation=[1, 2], groups=2, bias=True, affine=True,
             gamma=[0.0, -1.25, 0.75, 1.5], **relu),
        case("frozen_depthwise", [2, 3, 3, 3], [3, 1, 3, 3], frozen=True, padding=1, groups=3,
             affine=True, **relu),
        case("frozen_residual", [2, 2, 3, 3], [3, 2, 3, 3], frozen=True, padding=1, affine=True,
             residual=True, gamma=[0.0, -0.75, 1.25], **relu),
        case("frozen_residual_tutorial", [2, 2, 3, 4], [3, 2, 2, 2], frozen=True, bias=True,
             residual=True, **relu, **tutorial),
        case("frozen_one_position", [1, 3, 2, 2], [4, 3, 2, 2], frozen=True, affine=True,
             **relu),
        case("frozen_conv1d", [2, 2, 7], [3, 2, 3], frozen=True, stride=2, padding=[(1, 2)],
             affine=True, **relu),
        case("frozen_conv3d", [1, 2, 3, 3, 3], [3, 2, 2, 2, 2], frozen=True, bias=True,
             affine=True, **relu),
    ]  # fmt: skip


# --- Adadelta -------------------------------------------------------------------------------


def adadelta_run(name, seed, *, lr, rho, weight_decay, decay=None, steps=12):
    """`decay`, (factor, steps), is torch.optim.lr_scheduler.StepLR's."""
    torch.manual_seed(seed)
    shapes = {"vector": [7], "matrix": [2, 3]}
    initial, gradients = {}, {}
    for key, shape in shapes.items():
        initial[key] = torch.round(torch.randn(shape), decimals=4)
        # Magnitudes from 1e-3 to 1e2 within one parameter, and some exact zeros.
        scale = 10.0 ** torch.randint(-3, 3, shape)
        gradients[key] = torch.round(torch.randn([steps, *shape]) * scale, decimals=6)
        gradients[key].view(steps, -1)[::5, 2] = 0.0
    parameters = {key: t.clone().requires_grad_() for key, t in initial.items()}
    eps = 1e-6
    optimizer = torch.optim.Adadelta(
        parameters.values(), lr=lr, rho=rho, eps=eps, weight_decay=weight_decay
    )
    scheduler = None
    if decay is not None:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=decay[1], gamma=decay[0])

    rates, after = [], {key: [] for key in shapes}
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        for key, parameter in parameters.items():
            parameter.grad = gradients[key][step].clone()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        for key, parameter in parameters.items():
            state = optimizer.state[parameter]
            after[key].append(
                {
                    "parameter": numbers(parameter),
                    "square_avg": numbers(state["square_avg"]),
                    "acc_delta": numbers(state["acc_delta"]),
                }
            )
    return {
        "name": name,
        "rho": rho,
        "epsilon": eps,
        "weight_decay": weight_decay,
        "learning_rates": rates,
        "parameters": [
            {
                "name": key,
                "shape": shapes[key],
                "initial": numbers(initial[key]),
                "gradients": [numbers(g) for g in gradients[key]],
                "steps": after[key],
            }
            for key in shapes
        ],
    }


def adadelta_runs():
    return [
        adadelta_run("decayed_rate", 1, lr=1.0, rho=0.9, weight_decay=0.0, decay=(0.7, 6)),
        adadelta_run("weight_decay", 2, lr=0.5, rho=0.8, weight_decay=0.01),
    ]


# --- The tutorial's network -----------------------------------------------------------------

NET_SHAPES = {
    "conv1.weight": [2, 1, 3, 3],
    "conv2.weight": [3, 2, 3, 3],
    "fc1.weight": [5, 432],
    "fc1.bias": [5],
    "fc2.weight": [10, 5],
    "fc2.bias": [10],
}


def net_forward(weights, x, variant):
    """The tutorial's Net.forward, dropout off. Also returns the distance to the nearest kink."""
    distances = []

    def relu(x):
        distances.append(x.detach().abs().min().item())
        return F.relu(x)

    def conv_bn(x, weight):
        if variant["norm"] == "tutorial":
            return FusedConvBN2DFunction.apply(x, weight, variant["epsilon"])
        z = F.conv2d(x, weight)
        norm = nn.BatchNorm2d(
            z.shape[1], eps=variant["epsilon"], affine=False, track_running_stats=False
        )
        return norm(z)

    x = relu(conv_bn(x, weights["conv1.weight"]))
    x = relu(conv_bn(x, weights["conv2.weight"]))
    # A max pool's gradient jumps where its two best are equal, unless both are ReLU's zeros.
    best = F.unfold(x.detach().flatten(0, 1)[:, None], 2, stride=2).topk(2, dim=1).values
    gaps = (best[:, 0] - best[:, 1])[best[:, 0] > 0]
    distances.append(gaps.min().item())
    x = F.relu(F.max_pool2d(x, 2))
    x = relu(F.linear(x.flatten(1), weights["fc1.weight"], weights["fc1.bias"]))
    every_unit_is_used = bool((x > 0).any(dim=0).all())
    x = F.linear(x, weights["fc2.weight"], weights["fc2.bias"])
    return F.log_softmax(x, dim=1), min(distances) if every_unit_is_used else 0.0


def net():
    variants = [{"norm": "tutorial", "epsilon": 1e-3}, {"norm": "batch_norm", "epsilon": 1e-5}]
    targets = torch.tensor([3, 0, 7])
    for seed in range(10000):
        torch.manual_seed(seed)
        x = torch.round(torch.randn(3, 1, 28, 28), decimals=4)
        weights = {}
        for key, shape in NET_SHAPES.items():
            # PyTorch's own initialization: uniform within 1 / sqrt(fan in).
            fan_in = torch.tensor(NET_SHAPES[key.split(".")[0] + ".weight"][1:]).prod()
            weights[key] = torch.round((torch.rand(shape) * 2 - 1) / fan_in.sqrt(), decimals=4)
        if min(net_forward(weights, x, v)[1] for v in variants) > MARGIN:
            break
    else:
        raise AssertionError("no seed keeps clear of the kinks")

    results = []
    for variant in variants:
        given = {key: t.clone().requires_grad_() for key, t in weights.items()}
        log_probabilities, _ = net_forward(given, x, variant)
        loss = F.nll_loss(log_probabilities, targets)
        grads = torch.autograd.grad(loss, list(given.values()))

        def function(*inputs):
            return F.nll_loss(net_forward(dict(zip(given, inputs)), x, variant)[0], targets)

        assert torch.autograd.gradcheck(function, tuple(given.values()), atol=1e-6)
        results.append(
            variant
            | {
                "log_probabilities": tensor_json(log_probabilities),
                "loss": loss.item(),
                "gradients": {key: tensor_json(g) for key, g in zip(given, grads)},
            }
        )
    return {
        "x": tensor_json(x),
        "targets": targets.tolist(),
        "weights": {key: tensor_json(t) for key, t in weights.items()},
        "variants": results,
    }


# --- Files ----------------------------------------------------------------------------------


def numbers(t):
    """Row-major."""
    assert torch.isfinite(t).all()
    return t.detach().flatten().tolist()


def tensor_json(t):
    return {"shape": list(t.shape), "data": numbers(t)}


def write(path, content):
    """JSON with the items of top-level lists on lines of their own."""

    def compact(value):
        return json.dumps(value, separators=(",", ":"), allow_nan=False)

    fields = []
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(compact(item) for item in value) + "\n]"
        else:
            text = compact(value)
        fields.append(f"{compact(key)}:{text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n")
    assert json.loads(path.read_text()) == content
    print(f"{path.stat().st_size:>8} bytes  {path}")


def main():
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=root, help="root of the tree to write into (this repository)"
    )
    out = parser.parse_args().out / "crates"

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    source = {"torch_version": torch.__version__.split("+")[0]}

    check_tutorial_functions()
    files = {
        "burn-conv-bn/tests/data/pytorch_conv_bn.json": {
            "momentum": MOMENTUM,
            "cases": conv_bn_cases(),
        },
        "burn-conv-bn-models/tests/data/pytorch_adadelta.json": {"runs": adadelta_runs()},
        "burn-conv-bn-models/tests/data/pytorch_net.json": net(),
    }
    for path, content in files.items():
        write(out / path, source | content)


if __name__ == "__main__":
    main()
