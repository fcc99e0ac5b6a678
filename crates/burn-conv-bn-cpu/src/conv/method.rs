//! The algorithms by name, for the benchmark that compares them.

use super::direct::Direct;
use super::limit::{fits, slices, winograd_tile};
use super::packed::Packed;
use super::winograd::Winograd;
use super::{Chosen, is_for_slices, is_for_winograd, rule};
use crate::{Element, Geometry, Method};

impl Method {
    /// This algorithm for a geometry, if it applies.
    pub(super) fn of<E: Element>(self, geometry: &Geometry) -> Option<Chosen<'_, E::Real>> {
        match self {
            Self::Planes => Some(Chosen::Direct(Direct::shifted(geometry))),
            Self::WithoutGaps => Direct::dense(geometry).map(Chosen::Direct),
            Self::Winograd => is_for_winograd(geometry).then(|| {
                let tile = winograd_tile::<E>(geometry);
                Chosen::Winograd(Winograd::new(geometry, tile))
            }),
            Self::Slices if is_for_slices(geometry) => slices::<E>(geometry).map(Chosen::Slices),
            Self::Slices => None,
            Self::Packed => {
                let packed = Packed::new(geometry, size_of::<E::Real>());
                Some(Chosen::Packed(packed))
            }
        }
    }
}

impl Geometry {
    /// The same geometry with an algorithm, where it applies, whatever scratch it takes.
    #[doc(hidden)]
    pub fn with_method(mut self, method: Method) -> Self {
        self.method = Some(method);
        self
    }

    /// The algorithm that is chosen.
    #[doc(hidden)]
    pub fn method<E: Element>(&self) -> Method {
        match rule::<E>(self) {
            Chosen::Direct(direct) if direct.is_dense() => Method::WithoutGaps,
            Chosen::Direct(_) => Method::Planes,
            Chosen::Winograd(_) => Method::Winograd,
            Chosen::Slices(_) => Method::Slices,
            Chosen::Packed(_) => Method::Packed,
        }
    }

    /// Whether an algorithm stays within the limits of scratch; none if it does not apply.
    #[doc(hidden)]
    pub fn fits<E: Element>(&self, method: Method) -> Option<bool> {
        let chosen = method.of::<E>(self)?;
        Some(match &chosen {
            Chosen::Direct(direct) => fits::<E, _>(direct),
            Chosen::Winograd(winograd) => fits::<E, _>(winograd),
            Chosen::Slices(_) | Chosen::Packed(_) => true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What docs/cpu.md measured.
    #[test]
    fn the_rule_chooses_what_is_fast_and_fits() {
        let chosen = |batch: usize, [into, out, size]: [usize; 3], stride: usize, groups: usize| {
            let padding = [(0, 0), (1, 1), (1, 1)];
            let stride = [1, stride, stride];
            let (input, kernel) = ([1, size, size], [1, 3, 3]);
            let channels = [into, out];
            Geometry::new(
                batch, channels, groups, input, kernel, stride, padding, [1; 3],
            )
            .unwrap()
            .method::<f32>()
        };
        assert_eq!(chosen(8, [64, 64, 56], 1, 1), Method::Winograd);
        assert_eq!(chosen(8, [16, 16, 32], 1, 1), Method::Winograd);
        // Few channels in short rows.
        assert_eq!(chosen(8, [512, 512, 14], 1, 32), Method::Planes);
        // A weight that outweighs the activations, with tiles enough and too few.
        assert_eq!(chosen(32, [512, 512, 7], 1, 1), Method::Slices);
        assert_eq!(chosen(1, [512, 512, 7], 1, 1), Method::Packed);
        // Very many channels, and many where copies of the weight do not fit.
        assert_eq!(chosen(8, [256, 256, 56], 1, 1), Method::Slices);
        assert_eq!(chosen(32, [128, 128, 28], 1, 1), Method::Winograd);
        assert_eq!(chosen(8, [128, 256, 28], 1, 1), Method::Slices);
        // Planes without gaps, where they fit the limits.
        assert_eq!(chosen(32, [256, 256, 28], 2, 1), Method::WithoutGaps);
        assert_eq!(chosen(8, [256, 256, 28], 2, 1), Method::Planes);
        assert_eq!(chosen(8, [256, 512, 8], 2, 1), Method::Packed);
    }

    #[test]
    fn larger_kernels_take_winograd_from_some_channels_on() {
        for (batch, input, kernel) in [
            (32, [1, 56, 56], [1, 5, 5]),
            (32, [1, 56, 56], [1, 7, 3]),
            (2, [64, 64, 64], [3, 3, 3]),
        ] {
            for (channels, method) in [(15, Method::Planes), (32, Method::Winograd)] {
                let (channels, one) = ([channels; 2], [1; 3]);
                let padding = kernel.map(|len| (len / 2, len / 2));
                let geometry =
                    Geometry::new(batch, channels, 1, input, kernel, one, padding, one).unwrap();
                assert_eq!(geometry.method::<f32>(), method, "{geometry:?}");
            }
        }
    }
}
