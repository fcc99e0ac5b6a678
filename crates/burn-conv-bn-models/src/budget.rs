//! A budget of bytes for a network, instead of a policy for each block.

use std::fmt;

use burn_conv_bn::{ConvBn2d, Recompute};

use crate::walk::Walk;

/// What a network's `with_memory_budget` chose, and what it counts on.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Device;
/// use burn_conv_bn_models::{Form, ResNetBlockKind, ResNetConfig};
///
/// let network = ResNetConfig::new(Form::Fused, ResNetBlockKind::Basic, [1, 1, 1, 1])
///     .init(&Device::flex().autodiff());
/// let (network, plan) = network.with_memory_budget([8, 3, 64, 64], 6 << 20)?;
/// assert!(plan.bytes <= 6 << 20);
/// assert_eq!(plan.blocks[0].name, "conv1");
/// assert_eq!(network.conv1.settings.recompute, plan.blocks[0].recompute);
/// println!("{plan}");
///
/// let error = network.with_memory_budget([8, 3, 64, 64], 1 << 20).unwrap_err();
/// assert!(error.least > 1 << 20);
/// # }
/// # Ok::<(), burn_conv_bn_models::BudgetError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryPlan {
    /// Shape of the images that it is for.
    pub input_shape: [usize; 4],
    /// Bytes that were given.
    pub budget: usize,
    /// Bytes that a training step has allocated at the end of the forward pass: the sum of what is not shared in
    /// the network's `saved_for_backward`, with every parameter tracked that is tracked now.
    pub bytes: usize,
    /// The blocks in the order of the forward pass.
    pub blocks: Vec<BlockPlan>,
}

/// A block's part of a [`MemoryPlan`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockPlan {
    /// Its name in the network, as `layer1.0.conv1`.
    pub name: String,
    /// Its policy.
    pub recompute: Recompute,
    /// Multiply-adds of its convolution in the forward pass.
    pub multiply_adds: u64,
    /// Multiply-adds that the backward pass spends on what was not kept: those of the convolution with
    /// [`Recompute::Conv`], one for each value with [`Recompute::Norm`].
    pub recomputed: u64,
}

/// The least that a network can keep is more than its budget.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a training step on images {input_shape:?} keeps {} at least, {} were given, which `{layer}` exceeds; \
     use smaller batches or images, or a budget of {least} bytes",
    size(*least),
    size(*budget)
)]
#[non_exhaustive]
pub struct BudgetError {
    /// Shape of the images.
    pub input_shape: [usize; 4],
    /// Bytes that were given.
    pub budget: usize,
    /// Least possible bytes at the end of the forward pass.
    pub least: usize,
    /// First layer in the order of the forward pass whose tensors do not fit beside those before.
    pub layer: String,
}

impl MemoryPlan {
    /// Multiply-adds that the backward pass spends on what was not kept.
    pub fn recomputed(&self) -> u64 {
        self.blocks.iter().map(|block| block.recomputed).sum()
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: u64 = self.blocks.iter().map(|block| block.multiply_adds).sum();
        writeln!(
            f,
            "{} of {} at the end of the forward pass for images {:?}; {:.1} % of the blocks' multiply-adds are \
             recomputed",
            size(self.bytes),
            size(self.budget),
            self.input_shape,
            100.0 * self.recomputed() as f64 / all.max(1) as f64
        )?;
        for policy in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
            let blocks = self.blocks.iter().filter(|block| block.recompute == policy);
            let names: Vec<_> = blocks.map(|block| block.name.as_str()).collect();
            if !names.is_empty() {
                writeln!(f, "{policy:?}: {}", names.join(", "))?;
            }
        }
        write!(
            f,
            "Not counted: images, parameters, their gradients, graph nodes, and what the backward pass works with"
        )
    }
}

fn size(bytes: usize) -> String {
    let kib = bytes as f64 / 1024.0;
    if kib < 1024.0 {
        format!("{kib:.1} KiB")
    } else {
        format!("{:.1} MiB", kib / 1024.0)
    }
}

/// A network whose policies are looked for.
pub(crate) struct Search<N> {
    pub(crate) network: N,
    pub(crate) input_shape: [usize; 4],
    pub(crate) walk: fn(&N, [usize; 4]) -> Walk,
    pub(crate) blocks: fn(&mut N) -> Vec<(String, &mut ConvBn2d)>,
}

/// A change of a block's policy to one that recomputes less.
struct Upgrade {
    block: usize,
    from: Recompute,
    to: Recompute,
    /// Multiply-adds that it saves for each byte.
    gain: f64,
}

impl<N> Search<N> {
    pub(crate) fn fit(mut self, budget: usize) -> Result<(N, MemoryPlan), BudgetError> {
        for (_, block) in (self.blocks)(&mut self.network) {
            block.settings.recompute = Recompute::Conv;
        }
        let least = self.bytes();
        if least > budget {
            return Err(BudgetError {
                input_shape: self.input_shape,
                budget,
                least,
                layer: self.layer_beyond(budget),
            });
        }
        let convolutions = (self.walk)(&self.network, self.input_shape).convolutions;
        let mut blocks: Vec<_> = convolutions
            .iter()
            .map(|convolution| BlockPlan {
                name: convolution.name.clone(),
                recompute: Recompute::Conv,
                multiply_adds: convolution.multiply_adds,
                recomputed: 0,
            })
            .collect();
        let mut upgrades = Vec::new();
        for (index, convolution) in convolutions.iter().enumerate() {
            let name = &convolution.name;
            let (conv, norm) = (convolution.multiply_adds, convolution.outputs);
            let [norm_bytes, never_bytes] = [Recompute::Norm, Recompute::Never].map(|policy| {
                self.set(name, policy);
                self.bytes().saturating_sub(least)
            });
            self.set(name, Recompute::Conv);
            let mut upgrade = |from, to, saved: u64, bytes: usize| {
                upgrades.push(Upgrade {
                    block: index,
                    from,
                    to,
                    gain: saved as f64 / bytes.max(1) as f64,
                });
            };
            if never_bytes <= norm_bytes {
                upgrade(Recompute::Conv, Recompute::Never, conv, never_bytes);
            } else {
                let saved = conv.saturating_sub(norm);
                upgrade(Recompute::Conv, Recompute::Norm, saved, norm_bytes);
                let bytes = never_bytes - norm_bytes;
                upgrade(Recompute::Norm, Recompute::Never, norm, bytes);
            }
        }
        upgrades.sort_by(|a, b| b.gain.total_cmp(&a.gain));
        while self.take_first(&upgrades, &mut blocks, budget) {}
        for (block, convolution) in blocks.iter_mut().zip(&convolutions) {
            block.recomputed = match block.recompute {
                Recompute::Never => 0,
                Recompute::Norm => convolution.outputs,
                _ => convolution.multiply_adds,
            };
        }
        let plan = MemoryPlan {
            input_shape: self.input_shape,
            budget,
            bytes: self.bytes(),
            blocks,
        };
        Ok((self.network, plan))
    }

    /// Takes the upgrades that fit, in their order; whether there was any.
    fn take_first(
        &mut self,
        upgrades: &[Upgrade],
        blocks: &mut [BlockPlan],
        budget: usize,
    ) -> bool {
        let mut any = false;
        for upgrade in upgrades {
            let block = &mut blocks[upgrade.block];
            if block.recompute != upgrade.from {
                continue;
            }
            self.set(&block.name, upgrade.to);
            if self.bytes() <= budget {
                block.recompute = upgrade.to;
                any = true;
            } else {
                self.set(&block.name, upgrade.from);
            }
        }
        any
    }

    fn set(&mut self, name: &str, recompute: Recompute) {
        for (block_name, block) in (self.blocks)(&mut self.network) {
            if block_name == name {
                block.settings.recompute = recompute;
            }
        }
    }

    /// What is kept at the end of the forward pass.
    fn bytes(&self) -> usize {
        self.own().map(|(_, bytes)| bytes).sum()
    }

    /// The first layer whose tensors do not fit beside those before.
    fn layer_beyond(&self, budget: usize) -> String {
        let mut sum = 0;
        let beyond = self.own().find(|(_, bytes)| {
            sum += bytes;
            sum > budget
        });
        beyond.map(|(name, _)| name).unwrap_or_default()
    }

    /// Layers and bytes of what is not shared, in the order of the forward pass.
    fn own(&self) -> impl Iterator<Item = (String, usize)> {
        let saved = (self.walk)(&self.network, self.input_shape).into_saved();
        let own = saved.into_iter().filter(|(_, tensor)| !tensor.shared);
        own.map(|(name, tensor)| (name, tensor.bytes()))
    }
}
