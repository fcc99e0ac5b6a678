//! The fuzz target of the IDX reader, without a fuzzer: its seeds, and mutations of them.
//!
//! `BURN_CONV_BN_FUZZ_MUTATIONS` and `BURN_CONV_BN_FUZZ_SEED` choose how many and which.

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::str::FromStr;

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;

use exercise::exercise;
use idx::IdxProblem;

mod exercise;

/// The reader, by the names that the fuzz target has for it.
mod idx {
    pub use burn_conv_bn_train::data::{CLASSES, IdxProblem, Kind, PIXELS, parse_idx as parse};
}

const MUTATIONS: usize = 40_000;
const SEED: u64 = 20_260_401;

/// Most bytes of an input: mutations of mutations do not grow for ever.
const LONGEST: usize = 8 << 10;

fn variable<T: FromStr>(name: &str, default: T) -> T {
    match env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} is {text:?}")),
        Err(_) => default,
    }
}

/// The seeds, by name.
fn seeds() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/idx");
    let mut seeds: Vec<(String, Vec<u8>)> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect();
    // In the same order everywhere, or a seed would not give the same mutations again.
    seeds.sort();
    seeds
}

/// The items of images and of labels that an input has.
fn items(bytes: &[u8]) -> [Option<usize>; 2] {
    exercise(bytes).map(Result::ok)
}

#[test]
fn seeds_are_what_they_are_called() {
    let seeds = seeds();
    for (name, wanted) in [
        ("images", [Some(2), None]),
        ("labels", [None, Some(10)]),
        ("gzip-images", [Some(2), None]),
        ("gzip-labels-stored", [None, Some(10)]),
        ("gzip-labels-fixed", [None, Some(3)]),
        ("gzip-labels-members", [None, Some(10)]),
        ("gzip-labels-fields", [None, Some(10)]),
    ] {
        let (_, bytes) = seeds.iter().find(|(seed, _)| seed == name).expect(name);
        assert_eq!(items(bytes), wanted, "{name}");
    }
    let refused = seeds
        .iter()
        .filter(|(_, bytes)| items(bytes) == [None, None]);
    assert_eq!(refused.count(), seeds.len() - 7);

    // Each kind of refusal that is in the content is among them.
    let errors: Vec<IdxProblem> = seeds
        .iter()
        .flat_map(|(_, bytes)| exercise(bytes))
        .filter_map(Result::err)
        .collect();
    let kinds: [fn(&IdxProblem) -> bool; 8] = [
        |e| matches!(e, IdxProblem::Gzip { .. }),
        |e| matches!(e, IdxProblem::Truncated { .. }),
        |e| matches!(e, IdxProblem::Trailing { .. }),
        |e| matches!(e, IdxProblem::Magic { .. }),
        |e| matches!(e, IdxProblem::Shape { .. }),
        |e| matches!(e, IdxProblem::Empty),
        |e| matches!(e, IdxProblem::TooLarge { .. }),
        |e| matches!(e, IdxProblem::Label { .. }),
    ];
    for (i, kind) in kinds.iter().enumerate() {
        assert!(errors.iter().any(kind), "no error of kind {i}");
    }
}

#[test]
fn mutations_are_read_or_refused() {
    let mutations: usize = variable("BURN_CONV_BN_FUZZ_MUTATIONS", MUTATIONS);
    let seed: u64 = variable("BURN_CONV_BN_FUZZ_SEED", SEED);
    let seeds: Vec<Vec<u8>> = seeds().into_iter().map(|(_, bytes)| bytes).collect();
    let mut dice = Dice(ChaCha8Rng::seed_from_u64(seed));
    let (mut accepted, mut packed) = (0, 0);
    for mutation in 0..mutations {
        let input = dice.mutation(&seeds);
        let read = catch_unwind(AssertUnwindSafe(|| items(&input))).unwrap_or_else(|_| {
            let name = format!("burn-conv-bn-fuzz-{}", std::process::id());
            let path = env::temp_dir().join(name);
            fs::write(&path, &input).unwrap();
            panic!(
                "mutation {mutation} of seed {seed}, which is now in {}",
                path.display()
            );
        });
        accepted += usize::from(read != [None, None]);
        packed += usize::from(input.starts_with(&[0x1f, 0x8b]));
    }
    // Neither may be a special case of the other, or half of the reader would go unseen.
    assert!(
        accepted > mutations / 50,
        "{accepted} of {mutations} accepted"
    );
    assert!(
        accepted < mutations / 2,
        "{accepted} of {mutations} accepted"
    );
    assert!(packed > mutations / 5, "{packed} of {mutations} packed");
}

struct Dice(ChaCha8Rng);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        ((u64::from(self.0.next_u32()) * bound as u64) >> 32) as usize
    }

    fn pick<'a>(&mut self, from: &'a [Vec<u8>]) -> &'a [u8] {
        &from[self.below(from.len())]
    }

    /// A seed with a few changes to its content or to its packing.
    fn mutation(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = self.pick(seeds).to_vec();
        if self.below(2) == 0 {
            bytes = unpacked(bytes);
        }
        for _ in 0..self.below(4) {
            self.change(&mut bytes, seeds);
        }
        if self.below(3) == 0 {
            bytes = self.packed(&bytes);
            if self.below(2) == 0 {
                self.change(&mut bytes, seeds);
            }
        }
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let length = bytes.len();
        let at = self.below(length + 1);
        // Half of all changes are to the first bytes, which say what the others are.
        let at = match self.below(2) {
            0 => at.min(self.below(24)),
            _ => at,
        };
        match self.below(7) {
            0 if at < length => bytes[at] ^= 1 << self.below(8),
            1 if at < length => bytes[at] = self.below(256) as u8,
            // A number as a header has them: the side of a digit, the limit, none, all bits.
            2 if at + 4 <= length => {
                let words = [0u32, 1, 2, 28, 342_392, 342_393, 1 << 28, u32::MAX];
                let word = words[self.below(words.len())];
                bytes[at..at + 4].copy_from_slice(&word.to_be_bytes());
            }
            3 => bytes.truncate(at),
            4 => {
                let more = self.below(9);
                drop(bytes.splice(at..at, (0..more).map(|i| i as u8)));
            }
            5 => {
                let end = at + self.below(length - at + 1);
                bytes.drain(at..end);
            }
            // A piece of another seed replaces bytes.
            _ => {
                let other = self.pick(seeds);
                let from = self.below(other.len() + 1);
                let to = from + self.below(other.len() - from + 1);
                let end = length.min(at + self.below(2) * (to - from));
                drop(bytes.splice(at..end, other[from..to].iter().copied()));
            }
        }
        bytes.truncate(LONGEST);
    }

    fn packed(&mut self, bytes: &[u8]) -> Vec<u8> {
        let levels = [
            Compression::none(),
            Compression::fast(),
            Compression::best(),
        ];
        let level = levels[self.below(levels.len())];
        let mut encoder = GzEncoder::new(Vec::new(), level);
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }
}

/// What is packed in a seed, as far as it can be unpacked; the seed itself if nothing can.
fn unpacked(bytes: Vec<u8>) -> Vec<u8> {
    let mut inside = Vec::new();
    let decoder = MultiGzDecoder::new(bytes.as_slice());
    // An error comes after the bytes that were good.
    let _ = decoder.take(LONGEST as u64).read_to_end(&mut inside);
    if inside.is_empty() { bytes } else { inside }
}
