//! Circles between the source files of a package.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;

use anyhow::Result;

use super::source::{Modules, add, files};

/// Longest chain of re-exports that is followed.
const MOST_STEPS: usize = 16;

type Edges<'a> = BTreeMap<&'a Path, BTreeSet<&'a Path>>;

/// The circles of a package, each as `file -> file -> file`.
pub fn circles(package: &Path) -> Result<Vec<String>> {
    let src = package.join("src");
    let mut lines = Vec::new();
    for file in files(&src)? {
        let folder = file.parent().unwrap_or(&src);
        let roots = [src.join("lib.rs"), src.join("main.rs")];
        if folder == src.join("bin") || roots.contains(&file) {
            let mut modules = Modules::new();
            add(file.clone(), &[], folder, &mut modules)?;
            lines.extend(find(&edges(&modules), package));
        }
    }
    Ok(lines)
}

/// The files that each file imports from.
fn edges(modules: &Modules) -> Edges<'_> {
    let mut edges = Edges::new();
    for (path, module) in modules {
        let targets = edges.entry(module.file.as_path()).or_default();
        for named in &module.paths {
            let file = resolve(modules, path, named, 0);
            targets.extend(file.filter(|file| *file != module.file));
        }
    }
    edges
}

/// The file that defines what a path in a module names, re-exports followed. `None` for other crates.
fn resolve<'a>(
    modules: &'a Modules,
    module: &[String],
    named: &[String],
    steps: usize,
) -> Option<&'a Path> {
    let mut at = module.to_vec();
    for (index, name) in named.iter().enumerate() {
        let child = [&at[..], std::slice::from_ref(name)].concat();
        let (is_first, is_last) = (index == 0, index + 1 == named.len());
        match name.as_str() {
            "crate" if is_first => at.clear(),
            "self" if is_first => {}
            "super" => {
                at.pop();
            }
            // A single word is a module only where an import says so.
            _ if modules.contains_key(&child) && !(is_first && is_last) => at = child,
            _ => match modules[&at].names.get(name) {
                Some(target) if steps < MOST_STEPS && (!is_first || target != named) => {
                    let target = [&target[..], &named[index + 1..]].concat();
                    return resolve(modules, &at, &target, steps + 1);
                }
                None if is_first => return None,
                _ => break,
            },
        }
    }
    Some(&modules[&at].file)
}

/// Circles that share no file, the shortest through each file.
fn find(edges: &Edges<'_>, package: &Path) -> Vec<String> {
    let mut seen: BTreeSet<&Path> = BTreeSet::new();
    let mut lines = Vec::new();
    for &start in edges.keys() {
        let mut before = BTreeMap::new();
        let mut queue = VecDeque::from([start]);
        while let Some(file) = queue.pop_front() {
            for &next in edges[file].iter().filter(|next| !seen.contains(*next)) {
                if !before.contains_key(next) {
                    before.insert(next, file);
                    queue.push_back(next);
                }
            }
        }
        if !before.contains_key(start) {
            continue;
        }
        let mut circle = vec![start, before[start]];
        while circle[circle.len() - 1] != start {
            circle.push(before[circle[circle.len() - 1]]);
        }
        seen.extend(circle.iter().copied());
        let names = circle.iter().rev().map(|file| {
            let file = file.strip_prefix(package).unwrap_or(file);
            file.display().to_string()
        });
        lines.push(names.collect::<Vec<_>>().join(" -> "));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// The circles of a package of these files.
    fn of(files: &[(&str, &str)]) -> Vec<String> {
        let package = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = package.path().join("src").join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        circles(package.path()).unwrap()
    }

    #[test]
    fn a_circle_is_named_by_its_files() {
        let lib = ("lib.rs", "mod a; mod b; mod c; pub use a::{A,};");
        let [a, c] = [
            ("a.rs", "use crate::b::{self, B}; pub struct A;"),
            ("c.rs", "pub(super) const C: u8 = 0;"),
        ];
        let b = ("b/mod.rs", "pub struct B; fn f() { g(crate::A) }");
        assert_eq!(
            of(&[lib, a, b, c]),
            ["src/a.rs -> src/b/mod.rs -> src/a.rs"]
        );
        let b = ("b/mod.rs", "use super::c; pub struct B;");
        assert!(of(&[lib, a, b, c]).is_empty());
        let c = ("c.rs", "use super::{b as d,}; type A = d::A; use super::*;");
        assert_eq!(
            of(&[lib, a, b, c]),
            ["src/b/mod.rs -> src/c.rs -> src/b/mod.rs"]
        );
    }

    #[test]
    fn a_parent_that_uses_its_child_imports_it() {
        let child = ("a.rs", "use super::help; pub(crate) struct A;");
        for (parent, is_circle) in [
            ("mod a; pub(crate) use a::A; pub fn help() {}", false),
            ("mod a; pub use a::A; pub fn help(a: A) {}", true),
            ("mod a; use a::A; pub fn help() {}", true),
            ("mod a; pub fn help() {} use a::A;", true),
            ("mod a; #[cfg(unix)] use a::A; pub fn help() {}", true),
            ("mod a; pub fn help() { a::A; }", true),
            ("mod a; /// [`a::A`]\npub fn help() { \"a::A\" }", false),
            (
                "mod a; #[cfg(test)] use a::A; #[cfg(test)] mod tests { use super::a::A; }",
                false,
            ),
        ] {
            assert_eq!(
                !of(&[("main.rs", parent), child]).is_empty(),
                is_circle,
                "{parent}"
            );
        }
    }
}
