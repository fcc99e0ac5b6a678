//! The tests that run on a GPU: their list, and all of them as one program.
//!
//! They belong to other packages, where `cargo xtask test` runs them on WebGPU, each in a program of its
//! own. Built from here they are one program, in which most of their code is there once: what
//! `cargo xtask gpu-bundle` carries to a machine with CUDA. Some of them count what a whole process
//! allocates or launches, so that it has to be started once for each name of the list, with the name as
//! the filter: `gpu-tests kernels::`.

#![deny(missing_docs)]
// Each test file brings its own modules, as it does where it is a program, and some of them the same ones.
#![allow(clippy::duplicate_mod)]

/// The list of names, and a module of each.
macro_rules! tests {
    ($($name:ident = $file:tt,)*) => {
        /// The tests by the names of their programs in the packages that they belong to.
        pub const TESTS: &[&str] = &[$(stringify!($name)),*];

        $(
            #[cfg(all(test, feature = "cubecl"))]
            #[path = $file]
            mod $name;
        )*
    };
}

// In the order in which they are run: the parts first, and whole networks last.
tests! {
    kernels = "../../burn-conv-bn-cubecl/tests/kernels.rs",
    cube = "../../burn-conv-bn/tests/cube.rs",
    cube_property = "../../burn-conv-bn/tests/cube_property.rs",
    cube_launches = "../../burn-conv-bn/tests/cube_launches.rs",
    cube_memory = "../../burn-conv-bn/tests/cube_memory.rs",
    cube_leaks = "../../burn-conv-bn/tests/cube_leaks.rs",
    cube_convergence = "../../burn-conv-bn-train/tests/cube_convergence.rs",
}
