//! Vector code, compiled for each unit and chosen at run time.

pub(crate) mod chunk;
pub(crate) mod planes;
pub(crate) mod products;
pub(crate) mod sweeps;
