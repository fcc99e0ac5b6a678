//! Tensors as numbers, those of a network by name, and how far apart they are.

#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};

pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// Largest absolute difference; infinite where one is not a number.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |max, d| {
        if d.is_nan() {
            f64::INFINITY
        } else {
            d.max(max)
        }
    })
}

pub fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |max, value| value.abs().max(max))
}

/// `relative` to the largest wanted value.
#[track_caller]
pub fn assert_close(what: &str, got: &[f64], wanted: &[f64], relative: f64, absolute: f64) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    let tolerance = relative * largest(wanted) + absolute;
    let difference = distance(got, wanted);
    assert!(
        difference <= tolerance,
        "{what}: {difference:e} apart, {tolerance:e} allowed"
    );
}

/// Values by the names of their tensors.
pub type Named = BTreeMap<String, Vec<f64>>;

/// Whether a tensor is a norm's running statistic, by its name.
pub fn is_statistic(name: &str) -> bool {
    name.contains(".running_")
}

/// A network's tensors, or the gradients of its parameters. Panics if a gradient is missing.
pub fn collect<M: Module>(network: &M, gradients: Option<&Gradients>) -> Named {
    let mut collect = Collect {
        gradients,
        path: Vec::new(),
        found: Named::new(),
    };
    network.visit(&mut collect);
    collect.found
}

struct Collect<'a> {
    gradients: Option<&'a Gradients>,
    path: Vec<String>,
    found: Named,
}

impl ModuleVisitor for Collect<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = self.path.join(".");
        let tensor = match self.gradients {
            Some(_) if is_statistic(&name) => return,
            Some(gradients) => {
                let gradient = param.val().grad(gradients);
                gradient.unwrap_or_else(|| panic!("{name} has no gradient"))
            }
            None => param.val(),
        };
        self.found.insert(name, values(tensor));
    }
}
