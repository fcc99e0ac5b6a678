//! The op's halves: the convolution's backward pass, and the norm's passes.

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::DType;

use super::{assert_all_close, assert_close, geometries, random};
use crate::backend::{
    BatchNormBackwardOptions, ConvBackwardOptions, ConvBnBackend, ConvBnGrads, ConvSaved,
    NormInputs, NormSaved, NormStatistics, OptionalTensor, RunningStatistics,
};
use crate::flex::tensor::{geometry, host, output_shape};
use crate::portable;
use crate::spec::{Activation, BatchNormOptions, NormSpec, NormVariant, Parents};

/// Gradients of the fused op with those of one of its halves.
fn grads_of([input, weight, bias, gamma, beta]: [OptionalTensor<Flex>; 5]) -> ConvBnGrads<Flex> {
    ConvBnGrads {
        input,
        weight,
        bias,
        gamma,
        beta,
        residual: OptionalTensor::Absent,
    }
}

const ABSENT: OptionalTensor<Flex> = OptionalTensor::Absent;

/// The convolution's own backward pass; that of the portable body also image by image.
#[test]
fn backward_passes_of_convolutions_agree() {
    for (spec, input, weight) in geometries() {
        let (input, weight) = (random(&input, 1), random(&weight, 2));
        let geometry = geometry([&input.shape(), &weight.shape()], &spec, None);
        let output = output_shape(&input.shape(), &geometry);
        for max_workspace in [None, Some(1)] {
            let saved = ConvSaved::<Flex> {
                output_grad: random(&output.to_vec(), 3),
                input: Some(input.clone()).into(),
                weight: Some(weight.clone()).into(),
            };
            let options = ConvBackwardOptions {
                spec: spec.clone(),
                input_shape: input.shape(),
                weight_shape: weight.shape(),
                max_workspace,
                wanted: Parents {
                    input: true,
                    weight: true,
                    bias: true,
                    ..Parents::default()
                },
            };
            let wanted = portable::conv_bn::conv_backward::<Flex>(saved.clone(), &options);
            let got = Flex::conv_backward(saved, options);
            let [got, wanted] = [got, wanted]
                .map(|grads| grads_of([grads.input, grads.weight, grads.bias, ABSENT, ABSENT]));
            assert_all_close(&format!("{spec:?}, {max_workspace:?}"), got, wanted);
        }
    }
}

/// The norm's own passes, and its output from known statistics: the same bits.
#[test]
fn norms_alone_agree() {
    for activation in Activation::SAMPLES {
        for (variant, fixed) in [
            (NormVariant::BatchNorm, false),
            (NormVariant::Tutorial, false),
            (NormVariant::BatchNorm, true),
        ] {
            let options =
                BatchNormOptions::new(NormSpec::new(variant, 1e-3)).with_activation(activation);
            let inputs = |statistics| NormInputs::<Flex> {
                input: random(&[3, 4, 5, 2], 1),
                gamma: Some(random(&[4], 2)).into(),
                beta: Some(random(&[4], 3)).into(),
                statistics,
                running: RunningStatistics::Absent,
            };
            let given = |mean, variance| {
                if fixed {
                    NormStatistics::Fixed { mean, variance }
                } else {
                    NormStatistics::Known { mean, variance }
                }
            };
            let first = if fixed {
                given(random(&[4], 4), Flex::float_abs(random(&[4], 5)))
            } else {
                NormStatistics::Batch
            };
            let what = format!("{activation:?}, {variant:?}, fixed {fixed}");
            let wanted = portable::batch_norm::forward::<Flex>(inputs(first.clone()), options);
            let got = Flex::batch_normalize_forward(inputs(first), options);
            assert_close(&format!("{what}: output"), &got.output, &wanted.output);
            assert_close(&format!("{what}: mean"), &got.mean, &wanted.mean);
            let known = || inputs(given(got.mean.clone(), got.variance.clone()));
            let again = Flex::batch_normalize_forward(known(), options).output;
            assert_eq!(host::<f64>(&again), host::<f64>(&got.output), "{what}");

            let saved = NormSaved::<Flex> {
                output_grad: random(&[3, 4, 5, 2], 6),
                input: Some(known().input).into(),
                gamma: known().gamma,
                beta: known().beta,
                mean: got.mean.clone(),
                variance: got.variance.clone(),
            };
            let options = BatchNormBackwardOptions {
                options,
                statistics: known().statistics.kind(),
                norm_dtype: DType::F64,
                wanted: Parents {
                    input: true,
                    gamma: true,
                    beta: true,
                    ..Parents::default()
                },
            };
            let wanted = portable::batch_norm::backward::<Flex>(saved.clone(), &options);
            let got = Flex::batch_normalize_backward(saved, options);
            let [got, wanted] = [got, wanted]
                .map(|grads| grads_of([grads.input, ABSENT, ABSENT, grads.gamma, grads.beta]));
            assert_all_close(&what, got, wanted);
        }
    }
}
