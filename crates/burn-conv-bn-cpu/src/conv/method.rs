//! The algorithms by name, for the benchmark that compares them.

use super::direct::Direct;
use super::limit::{fits, slices, winograd_tile};
use super::packed::Packed;
use super::winograd::Winograd;
use super::{Chosen, is_for_winograd, rule};
use crate::{Element, Geometry};

/// An algorithm of the convolution.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Planes,
    WithoutGaps,
    Winograd,
    Slices,
    Packed,
}

impl Method {
    pub const ALL: [Self; 5] = [
        Self::Planes,
        Self::WithoutGaps,
        Self::Winograd,
        Self::Slices,
        Self::Packed,
    ];

    /// This algorithm for a geometry, if it applies.
    pub(super) fn of<E: Element>(self, geometry: &Geometry) -> Option<Chosen<'_, E::Real>> {
        let is_for_winograd = is_for_winograd(geometry);
        match self {
            Self::Planes => Some(Chosen::Direct(Direct::shifted(geometry))),
            Self::WithoutGaps => Direct::dense(geometry).map(Chosen::Direct),
            Self::Winograd => is_for_winograd.then(|| {
                let tile = winograd_tile::<E>(geometry);
                Chosen::Winograd(Winograd::new(geometry, tile))
            }),
            Self::Slices if is_for_winograd => slices::<E>(geometry).map(Chosen::Slices),
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
