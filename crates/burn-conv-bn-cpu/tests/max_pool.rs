//! The max pool and its gradient against naive loops, to the bit. The loops are themselves checked by
//! hand.

use std::env;
use std::fmt::Debug;
use std::ops::Range;

use burn_conv_bn_cpu::{
    Element, PoolGeometry, PoolGeometryError, Real, max_pool, max_pool_backward,
};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A max pool's numbers, from which both the geometry and the naive loops are made.
#[derive(Clone, Copy, Debug)]
struct Case {
    planes: usize,
    input: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
    dilation: [usize; 2],
    ceil_mode: bool,
    /// Of the values.
    seed: u64,
}

/// The tutorial's and VGG's: windows side by side.
const TILES: Case = Case {
    planes: 3,
    input: [24, 24],
    kernel: [2, 2],
    stride: [2, 2],
    padding: [0, 0],
    dilation: [1, 1],
    ceil_mode: false,
    seed: 0,
};

/// ResNet's: windows that overlap.
const OVERLAP: Case = Case {
    planes: 3,
    input: [22, 38],
    kernel: [3, 3],
    stride: [2, 2],
    padding: [1, 1],
    dilation: [1, 1],
    ceil_mode: false,
    seed: 0,
};

/// Odd sizes, few columns and many, several bands of rows, strides below and above the kernel's size,
/// dilation, padding beyond the window, windows larger than the input, ceil mode.
fn cases() -> Vec<Case> {
    let mut cases = vec![
        OVERLAP,
        Case {
            input: [130, 140],
            ..OVERLAP
        },
        Case {
            padding: [0, 0],
            ..OVERLAP
        },
        Case {
            padding: [1, 0],
            ceil_mode: true,
            ..OVERLAP
        },
        Case {
            stride: [1, 1],
            ..OVERLAP
        },
        Case {
            kernel: [5, 5],
            stride: [1, 1],
            padding: [2, 2],
            ..OVERLAP
        },
        Case {
            stride: [1, 3],
            padding: [1, 2],
            ..OVERLAP
        },
        Case {
            stride: [4, 5],
            padding: [0, 1],
            ..OVERLAP
        },
        Case {
            kernel: [1, 1],
            padding: [0, 0],
            ..OVERLAP
        },
        Case {
            kernel: [1, 2],
            stride: [3, 2],
            padding: [0, 3],
            ..OVERLAP
        },
        Case {
            dilation: [2, 3],
            padding: [3, 2],
            ..OVERLAP
        },
        Case {
            input: [100, 9],
            dilation: [30, 2],
            stride: [1, 2],
            padding: [20, 3],
            ..OVERLAP
        },
        // Windows wholly in padding, and between whose columns the input lies.
        Case {
            input: [2, 1],
            kernel: [2, 2],
            stride: [1, 1],
            padding: [4, 3],
            dilation: [1, 3],
            ..OVERLAP
        },
        Case {
            input: [3, 4],
            kernel: [2, 3],
            dilation: [9, 7],
            padding: [0, 0],
            ceil_mode: true,
            ..OVERLAP
        },
        // As many taps as a byte has values.
        Case {
            input: [20, 37],
            kernel: [16, 16],
            stride: [3, 2],
            padding: [8, 5],
            ..OVERLAP
        },
        Case {
            kernel: [1, 256],
            input: [2, 300],
            stride: [1, 7],
            padding: [0, 0],
            ..OVERLAP
        },
        // Strides beyond the input.
        Case {
            input: [7, 9],
            stride: [1000, 2000],
            ..OVERLAP
        },
        Case {
            kernel: [2, 2],
            stride: [2, 2],
            padding: [1, 1],
            ..OVERLAP
        },
        Case {
            kernel: [2, 2],
            stride: [2, 2],
            padding: [0, 0],
            dilation: [2, 1],
            ..OVERLAP
        },
    ];
    for size in [1, 2, 3, 7, 14, 15, 16, 17, 33, 90] {
        for ceil_mode in [false, true] {
            for input in [[size, size], [size, 3], [4, size]] {
                cases.push(Case {
                    input,
                    ceil_mode,
                    ..TILES
                });
                cases.push(Case {
                    input,
                    ceil_mode,
                    ..OVERLAP
                });
            }
        }
    }
    for (seed, case) in cases.iter_mut().enumerate() {
        case.seed = seed as u64;
    }
    cases
}

impl Case {
    fn geometry(&self) -> PoolGeometry {
        PoolGeometry::new(
            self.planes,
            self.input,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
        )
        .unwrap_or_else(|error| panic!("{self:?}: {error}"))
    }

    /// Windows of one dimension, counted one by one.
    fn windows(&self, dim: usize) -> usize {
        let extent = (self.kernel[dim] - 1) * self.dilation[dim] + 1;
        let padded = self.input[dim] + 2 * self.padding[dim];
        let start = |window: usize| window * self.stride[dim];
        if !self.ceil_mode {
            return (0..)
                .take_while(|window| start(*window) + extent <= padded)
                .count();
        }
        // The next one counts as long as the one before it has not come to the end.
        let reaching = (1..)
            .take_while(|window| start(*window - 1) + extent < padded)
            .count();
        let last_is_behind = start(reaching) >= self.input[dim] + self.padding[dim];
        reaching + usize::from(padded < extent || !last_is_behind)
    }

    fn input_len(&self) -> usize {
        self.planes * self.input[0] * self.input[1]
    }

    fn output_len(&self) -> usize {
        self.planes * self.windows(0) * self.windows(1)
    }

    /// Calls `visit` with each output in order, and with the places of its window that are in the input
    /// and where these are.
    fn for_each_window(&self, mut visit: impl FnMut(usize, &[(usize, usize)])) {
        let [height, width] = self.input;
        let mut output = 0;
        for plane in 0..self.planes {
            for row in 0..self.windows(0) {
                for column in 0..self.windows(1) {
                    let mut met = Vec::new();
                    for place in 0..self.kernel[0] * self.kernel[1] {
                        let tap = [place / self.kernel[1], place % self.kernel[1]];
                        let at = |dim: usize, output: usize| {
                            (output * self.stride[dim] + tap[dim] * self.dilation[dim])
                                .checked_sub(self.padding[dim])
                                .filter(|at| *at < self.input[dim])
                        };
                        if let (Some(row), Some(column)) = (at(0, row), at(1, column)) {
                            met.push((place, (plane * height + row) * width + column));
                        }
                    }
                    visit(output, &met);
                    output += 1;
                }
            }
        }
    }

    /// Values, and the argmax of each window that meets the input.
    fn pool<T: Real>(&self, input: &[T]) -> (Vec<T>, Vec<Option<u8>>) {
        let (mut values, mut argmax) = (Vec::new(), Vec::new());
        self.for_each_window(|_, met| {
            let mut best: Option<(T, usize)> = None;
            for (place, at) in met {
                let value = input[*at];
                let is_nan = value.to_f64().is_nan();
                if best.is_none_or(|(best, _)| value > best || is_nan) {
                    best = Some((value, *place));
                }
            }
            let nothing = T::from_f64(f64::NEG_INFINITY);
            values.push(best.map_or(nothing, |(value, _)| value));
            argmax.push(best.map(|(_, place)| u8::try_from(place).expect("up to 256 places")));
        });
        (values, argmax)
    }

    fn pool_backward<T: Real>(&self, output_grad: &[T], argmax: &[Option<u8>]) -> Vec<T> {
        let mut input_grad = vec![T::ZERO; self.input_len()];
        self.for_each_window(|output, met| {
            for (place, at) in met {
                if argmax[output] == u8::try_from(*place).ok() {
                    input_grad[*at] += output_grad[output];
                }
            }
        });
        input_grad
    }
}

fn loaded<E: Element>(values: &[E]) -> Vec<E::Real> {
    let mut loaded = vec![E::Real::ZERO; values.len()];
    E::load(values, &mut loaded);
    loaded
}

fn stored<E: Element>(values: &[E::Real]) -> Vec<E> {
    let mut stored = vec![E::default(); values.len()];
    E::store(values, &mut stored);
    stored
}

/// The values' bits, the same for every NaN.
fn bits<E: Element>(values: &[E]) -> Vec<u64> {
    let bits = |value: f64| {
        if value.is_nan() {
            f64::NAN.to_bits()
        } else {
            value.to_bits()
        }
    };
    loaded(values)
        .into_iter()
        .map(|value| bits(value.to_f64()))
        .collect()
}

#[track_caller]
fn assert_same<T: Debug + PartialEq>(what: &str, case: &Case, got: &[T], wanted: &[T]) {
    assert_eq!(got.len(), wanted.len(), "{what} of {case:?}");
    let differs = got
        .iter()
        .zip(wanted)
        .position(|(got, wanted)| got != wanted);
    if let Some(at) = differs {
        let (got, wanted) = (&got[at], &wanted[at]);
        panic!("{what} of {case:?}: {got:?} at {at}, not {wanted:?}");
    }
}

/// What an input is drawn from.
#[derive(Clone, Copy, Debug)]
enum Values {
    /// A few numbers, so that windows have ties.
    Coarse,
    Fine,
    /// Those that compare in unusual ways, so many of ten.
    Odd(u32),
}

impl Values {
    fn draw<E: Element>(self, len: usize, rng: &mut ChaCha8Rng) -> Vec<E> {
        const ODD: [f64; 5] = [f64::NAN, f64::NEG_INFINITY, f64::INFINITY, -0.0, 0.0];
        let values: Vec<E::Real> = (0..len)
            .map(|_| {
                E::Real::from_f64(match self {
                    Values::Coarse => f64::from(rng.random_range(-6_i32..6)) / 4.0,
                    Values::Odd(share) if rng.random_range(0..10) < share => {
                        ODD[rng.random_range(0..ODD.len())]
                    }
                    Values::Fine | Values::Odd(_) => rng.random_range(-1.0..1.0),
                })
            })
            .collect();
        stored(&values)
    }
}

/// Compares both kernels with the loops, over an input drawn from `values`.
#[track_caller]
fn compare<E: Element>(case: &Case, values: Values) {
    let rng = &mut ChaCha8Rng::seed_from_u64(case.seed);
    let input: Vec<E> = values.draw(case.input_len(), rng);
    let geometry = case.geometry();
    let output_size = [case.windows(0), case.windows(1)];
    assert_eq!(geometry.output(), output_size, "{case:?}");
    let (wanted, wanted_argmax) = case.pool(&loaded(&input));
    let wanted = stored::<E>(&wanted);

    // Whatever the buffers hold is replaced: more than there will be, less, or nothing.
    let what = |what: &str| format!("{what} of {values:?}");
    let mut output = vec![E::default(); wanted.len() + 3];
    let mut argmax = vec![7; wanted.len() / 2];
    max_pool(&geometry, &input, &mut output, Some(&mut argmax));
    assert_same(&what("output"), case, &bits(&output), &bits(&wanted));
    assert_eq!(argmax.len(), wanted.len(), "{case:?}");
    let told: Vec<Option<u8>> = argmax
        .iter()
        .zip(&wanted_argmax)
        .map(|(place, wanted)| wanted.map(|_| *place))
        .collect();
    assert_same(&what("argmax"), case, &told, &wanted_argmax);
    let mut alone = Vec::new();
    max_pool(&geometry, &input, &mut alone, None);
    assert_same(&what("output alone"), case, &bits(&alone), &bits(&wanted));

    // Of the gradients some are zero, with either sign.
    let mut output_grad: Vec<E> = Values::Fine.draw(wanted.len(), rng);
    for grad in &mut output_grad {
        if rng.random_range(0..4) == 0 {
            let zero = if rng.random() { 0.0 } else { -0.0 };
            *grad = stored::<E>(&[E::Real::from_f64(zero)])[0];
        }
    }
    let wanted = stored::<E>(&case.pool_backward(&loaded(&output_grad), &wanted_argmax));
    let mut input_grad = vec![E::default(); wanted.len() / 2];
    max_pool_backward(&geometry, &output_grad, &argmax, &mut input_grad);
    assert_same(&what("gradient"), case, &bits(&input_grad), &bits(&wanted));
}

fn compare_all<E: Element>() {
    for case in cases() {
        for values in [
            Values::Coarse,
            Values::Fine,
            Values::Odd(5),
            Values::Odd(10),
        ] {
            compare::<E>(&case, values);
        }
    }
}

#[test]
fn in_f32() {
    compare_all::<f32>();
}

#[test]
fn in_f64() {
    compare_all::<f64>();
}

#[test]
fn in_f16() {
    compare_all::<f16>();
}

#[test]
fn in_bf16() {
    compare_all::<bf16>();
}

/// Small shapes of every kind, from seeds that `BURN_CONV_BN_SEED` changes. A failure prints the case
/// with its seed.
#[test]
fn over_random_geometries() {
    const CASES: u64 = 1000;
    let chosen = env::var("BURN_CONV_BN_SEED").unwrap_or_else(|_| "0".to_string());
    let chosen: u64 = chosen.parse().expect("BURN_CONV_BN_SEED is a number");
    for index in 0..CASES {
        let seed = chosen.wrapping_mul(CASES).wrapping_add(index);
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let mut pair = |sizes: Range<usize>| [0, 1].map(|_| rng.random_range(sizes.clone()));
        let case = Case {
            planes: 2,
            input: pair(0..40),
            kernel: pair(1..6),
            stride: pair(1..5),
            padding: pair(0..4),
            dilation: pair(1..4),
            ceil_mode: pair(0..2) == [0, 0],
            seed,
        };
        compare::<f32>(&case, Values::Odd(2));
    }
}

/// The reference itself, on numbers that can be followed.
#[test]
fn the_naive_loops_are_right() {
    let case = Case {
        planes: 1,
        input: [3, 4],
        kernel: [2, 2],
        stride: [2, 3],
        padding: [1, 1],
        dilation: [1, 1],
        ceil_mode: false,
        seed: 0,
    };
    // Windows of rows -1 and 0, or 1 and 2; of columns -1 and 0, or 2 and 3.
    let input: [f64; 12] = [
        1.0,
        2.0,
        3.0,
        3.0, //
        4.0,
        5.0,
        6.0,
        7.0, //
        8.0,
        9.0,
        f64::NAN,
        f64::NAN,
    ];
    let (values, argmax) = case.pool(&input);
    assert_eq!(values[..3], [1.0, 3.0, 8.0]);
    assert!(values[3].is_nan());
    assert_eq!(argmax, [3, 2, 3, 3].map(Some));
    let grad = case.pool_backward(&[1.0, 2.0, 4.0, 8.0], &argmax);
    let mut wanted = [0.0; 12];
    (wanted[0], wanted[2], wanted[8], wanted[11]) = (1.0, 2.0, 4.0, 8.0);
    assert_eq!(grad, wanted);

    // Windows of a line, two of which share the 9.
    let line = Case {
        input: [1, 5],
        kernel: [1, 3],
        stride: [1, 2],
        padding: [0, 0],
        ..case
    };
    let (values, argmax) = line.pool(&[0.0, 1.0, 9.0, 2.0, 3.0]);
    assert_eq!(values, [9.0, 9.0]);
    assert_eq!(argmax, [Some(2), Some(0)]);
    let grad = line.pool_backward(&[0.5, 0.25], &argmax);
    assert_eq!(grad, [0.0, 0.0, 0.75, 0.0, 0.0]);
}

/// Sizes of the output as Burn's Flex backend has them: input, kernel, padding, stride, dilation, without
/// and with ceil mode.
#[test]
fn sizes_of_the_output() {
    for (input, kernel, padding, stride, dilation, floor, ceil) in [
        (4, 2, 0, 2, 1, 2, 2),
        (4, 2, 1, 2, 1, 3, 3),
        (5, 2, 0, 2, 1, 2, 3),
        (7, 2, 0, 1, 2, 5, 5),
        (5, 2, 1, 2, 1, 3, 3),
        (5, 2, 1, 3, 2, 2, 2),
        (112, 3, 1, 2, 1, 56, 57),
        (2, 3, 0, 2, 1, 0, 1),
        (0, 1, 0, 1, 1, 0, 1),
        (1, 1, 3, 1, 1, 7, 6),
    ] {
        for (ceil_mode, wanted) in [(false, floor), (true, ceil)] {
            let case = Case {
                planes: 1,
                input: [input, 1],
                kernel: [kernel, 1],
                stride: [stride, 1],
                padding: [padding, 0],
                dilation: [dilation, 1],
                ceil_mode,
                seed: 0,
            };
            assert_eq!(case.geometry().output(), [wanted, 1], "{case:?}");
            assert_eq!(case.windows(0), wanted, "{case:?}");
        }
    }
}

#[test]
fn no_planes_give_nothing() {
    for case in [TILES, OVERLAP] {
        let case = Case { planes: 0, ..case };
        let (mut output, mut argmax, mut grad) = (vec![1.0f32], vec![1], vec![1.0f32]);
        max_pool(&case.geometry(), &[], &mut output, Some(&mut argmax));
        assert!(output.is_empty() && argmax.is_empty());
        max_pool_backward(&case.geometry(), &[], &[], &mut grad);
        assert!(grad.is_empty());
    }
}

/// Planes without values under windows, and values that no window meets.
#[test]
fn nothing_to_pool_and_nothing_pooled() {
    for (input, padding, ceil_mode) in [
        ([0, 5], [3, 0], false),
        ([5, 0], [0, 3], false),
        ([0, 0], [2, 2], true),
        ([2, 2], [0, 0], false),
        ([1, 9], [0, 0], false),
    ] {
        let case = Case {
            input,
            padding,
            ceil_mode,
            ..OVERLAP
        };
        compare::<f32>(&case, Values::Fine);
    }
}

/// More planes than a task has, and rows than a band.
#[test]
fn the_number_of_threads_changes_no_bit() {
    for case in [
        Case {
            planes: 300,
            input: [24, 25],
            ..TILES
        },
        Case {
            planes: 9,
            input: [112, 112],
            ..OVERLAP
        },
    ] {
        let geometry = case.geometry();
        let rng = &mut ChaCha8Rng::seed_from_u64(1);
        let input: Vec<f32> = Values::Fine.draw(case.input_len(), rng);
        let output_grad: Vec<f32> = Values::Fine.draw(case.output_len(), rng);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("threads can be started");
            pool.install(|| {
                let (mut output, mut argmax, mut grad) = (Vec::new(), Vec::new(), Vec::new());
                max_pool(&geometry, &input, &mut output, Some(&mut argmax));
                max_pool_backward(&geometry, &output_grad, &argmax, &mut grad);
                (bits(&output), argmax, bits(&grad))
            })
        };
        let alone = on(1);
        for threads in [2, 3, 7] {
            assert!(on(threads) == alone, "{threads} threads: {case:?}");
        }
        // And what they all compute is right.
        compare::<f32>(&case, Values::Coarse);
    }
}

/// A place that is not in the window, or in the padding, is no one's: its gradient goes nowhere, and
/// certainly not to a neighbour.
#[test]
fn places_outside_pass_nothing_on() {
    for (case, outside) in [(TILES, 4), (TILES, 255), (OVERLAP, 9), (OVERLAP, 255)] {
        let geometry = case.geometry();
        let output_grad = vec![1.0f32; case.output_len()];
        let mut grad = Vec::new();
        let argmax = vec![outside; output_grad.len()];
        max_pool_backward(&geometry, &output_grad, &argmax, &mut grad);
        assert_eq!(grad, vec![0.0; case.input_len()], "{case:?}");
    }
    // The first place of the first row's and the first column's windows is padding.
    let geometry = OVERLAP.geometry();
    let output_grad = vec![1.0f32; OVERLAP.output_len()];
    let mut grad = Vec::new();
    let argmax = vec![0; output_grad.len()];
    max_pool_backward(&geometry, &output_grad, &argmax, &mut grad);
    let [height, width] = geometry.output();
    let passed = OVERLAP.planes * (height - 1) * (width - 1);
    assert_eq!(grad.iter().sum::<f32>(), passed as f32);
}

#[test]
fn refuses_what_there_is_not() {
    let new = |case: Case| {
        PoolGeometry::new(
            case.planes,
            case.input,
            case.kernel,
            case.stride,
            case.padding,
            case.dilation,
            case.ceil_mode,
        )
    };
    for (case, what, got) in [
        (
            Case {
                kernel: [0, 2],
                ..TILES
            },
            "kernel size",
            [0, 2],
        ),
        (
            Case {
                stride: [2, 0],
                ..TILES
            },
            "stride",
            [2, 0],
        ),
        (
            Case {
                dilation: [0, 0],
                ..TILES
            },
            "dilation",
            [0, 0],
        ),
    ] {
        let error = new(case).unwrap_err();
        assert_eq!(error, PoolGeometryError::Zero { what, got });
        assert_eq!(
            error.to_string(),
            format!("{what} must be positive, got {got:?}")
        );
    }

    let error = new(Case {
        kernel: [257, 1],
        ..TILES
    })
    .unwrap_err();
    assert_eq!(error, PoolGeometryError::Places { kernel: [257, 1] });
    assert!(error.to_string().contains("[257, 1]"), "{error}");
    assert!(error.to_string().contains("256"), "{error}");
    let most = Case {
        kernel: [usize::MAX; 2],
        ..TILES
    };
    assert!(matches!(new(most), Err(PoolGeometryError::Places { .. })));

    let large = usize::MAX / 2;
    for case in [
        Case {
            input: [large, 3],
            ..TILES
        },
        Case {
            planes: large,
            ..TILES
        },
        Case {
            padding: [0, usize::MAX],
            ..TILES
        },
        Case {
            padding: [large, 0],
            ..TILES
        },
        Case {
            dilation: [1, usize::MAX],
            ..TILES
        },
        Case {
            stride: [usize::MAX, 1],
            ..TILES
        },
    ] {
        for ceil_mode in [false, true] {
            let case = Case { ceil_mode, ..case };
            let error = new(case).unwrap_err();
            assert!(
                matches!(error, PoolGeometryError::TooLarge { .. }),
                "{case:?}: {error}"
            );
            assert!(error.to_string().contains(&format!("{:?}", case.padding)));
        }
    }
}

#[test]
#[should_panic(expected = "input")]
fn refuses_another_input() {
    let input = vec![0.0f32; TILES.input_len() + 1];
    max_pool(&TILES.geometry(), &input, &mut Vec::new(), None);
}

#[test]
#[should_panic(expected = "output gradient")]
fn refuses_another_output_gradient() {
    let len = TILES.output_len();
    let (grad, argmax) = (vec![0.0f32; len + 1], vec![0; len]);
    max_pool_backward(&TILES.geometry(), &grad, &argmax, &mut Vec::new());
}

#[test]
#[should_panic(expected = "argmax")]
fn refuses_other_places() {
    let len = TILES.output_len();
    let (grad, argmax) = (vec![0.0f32; len], vec![0; len - 1]);
    max_pool_backward(&TILES.geometry(), &grad, &argmax, &mut Vec::new());
}
