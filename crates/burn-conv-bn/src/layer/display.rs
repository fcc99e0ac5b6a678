//! A layer as one line of text.

use burn::module::Content;

use super::borrowed::ConvBnRef;
use super::convolution::Convolution;

/// Defaults of Burn's batch norm.
const EPSILON: f64 = 1e-5;
const MOMENTUM: f64 = 0.1;

impl<C: Convolution<D>, const D: usize> ConvBnRef<'_, C, D> {
    /// Adds shape, activation and policy, and whatever else differs from the defaults. Draws no parameter.
    pub(super) fn describe(&self, content: Content) -> Content {
        let weight = self.conv.weight().lazy_shape();
        let spec = self.conv.spec(&weight);
        let channels = format!("{} -> {}", weight[1] * spec.groups, weight[0]);
        let mut content = content
            .add("channels", &channels)
            .add_debug_attribute("kernel", &&weight[2..])
            .add_debug_attribute("stride", &spec.stride)
            .add("padding", &self.conv.padding());
        if spec.dilation.iter().any(|dilation| *dilation != 1) {
            content = content.add_debug_attribute("dilation", &spec.dilation);
        }
        if spec.groups != 1 {
            content = content.add("groups", &spec.groups);
        }
        if self.conv.bias().is_some() {
            content = content.add("bias", &true);
        }
        content = self.settings.describe(content);
        for (name, value, default) in [
            ("epsilon", self.norm.epsilon, EPSILON),
            ("momentum", self.norm.momentum, MOMENTUM),
        ] {
            if value != default {
                content = content.add(name, &value);
            }
        }
        // As Burn's norm: frozen.
        if !self.norm.training.is_enabled() {
            content = content.add("training", &self.norm.training);
        }
        content
    }
}
