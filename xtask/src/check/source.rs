//! A package's source files as tokens, and its modules.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// A module: its file, what the names in it stand for, and the paths in its code.
#[derive(Debug, Default)]
pub struct Module {
    pub file: PathBuf,
    pub names: BTreeMap<String, Vec<String>>,
    pub paths: Vec<Vec<String>>,
}

/// The modules of a library or a program, by their paths.
pub type Modules = BTreeMap<Vec<String>, Module>;

/// Every source file in a folder, sorted.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries = fs::read_dir(folder);
    for entry in entries.with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(self::files(&path)?);
        } else if path.extension().is_some_and(|end| end == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// A file's text and tokens.
pub fn read(file: &Path) -> Result<(String, Vec<TokenTree>)> {
    let name = file.display();
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {name}"))?;
    let tokens: Result<TokenStream, _> = text.parse();
    let tokens = tokens.map_err(|error| anyhow!("{name}: {error}"))?;
    Ok((text, tokens.into_iter().collect()))
}

/// The tokens in a pair of brackets.
pub fn inside(group: &Group) -> Vec<TokenTree> {
    group.stream().into_iter().collect()
}

/// The place of an item's end: its semicolon or its braces.
pub fn item_end(tokens: &[TokenTree]) -> Option<usize> {
    tokens.iter().position(|token| match token {
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        other => is(other, ";"),
    })
}

/// Adds the module of a file, and those that it declares in `folder`, without modules for tests.
pub fn add(file: PathBuf, path: &[String], folder: &Path, modules: &mut Modules) -> Result<()> {
    let (_, tokens) = read(&file)?;
    add_tokens(&tokens, file, path, folder, modules)
}

fn add_tokens(
    tokens: &[TokenTree],
    file: PathBuf,
    path: &[String],
    folder: &Path,
    modules: &mut Modules,
) -> Result<()> {
    let mut module = Module {
        file,
        ..Module::default()
    };
    scan(tokens, &mut module, path, folder, modules)?;
    modules.insert(path.to_vec(), module);
    Ok(())
}

/// Adds what the tokens of a module declare, import and name.
fn scan(
    tokens: &[TokenTree],
    module: &mut Module,
    path: &[String],
    folder: &Path,
    modules: &mut Modules,
) -> Result<()> {
    let mut at = 0;
    while at < tokens.len() {
        let before = tokens[..at].last();
        match &tokens[at..] {
            [TokenTree::Punct(_), TokenTree::Group(group), rest @ ..] if is_for_tests(group) => {
                at += 2 + item_end(rest).unwrap_or(rest.len());
            }
            [TokenTree::Group(group), ..] => {
                scan(&inside(group), module, path, folder, modules)?;
            }
            [word, TokenTree::Ident(name), end, ..] if is(word, "mod") => {
                let child = [path, &[name.to_string()]].concat();
                let beside = folder.join(name.to_string());
                if let TokenTree::Group(group) = end {
                    let file = module.file.clone();
                    add_tokens(&inside(group), file, &child, &beside, modules)?;
                } else {
                    let files = [beside.with_extension("rs"), beside.join("mod.rs")];
                    if let Some(file) = files.into_iter().find(|file| file.is_file()) {
                        add(file, &child, &beside, modules)?;
                    }
                }
                at += 2;
            }
            [word, rest @ ..] if is(word, "use") => {
                let end = rest.iter().position(|token| is(token, ";"));
                let rest = &rest[..end.unwrap_or(rest.len())];
                let is_public = before.is_some_and(|token| match token {
                    // Of `pub(crate)`.
                    TokenTree::Group(group) => group.delimiter() == Delimiter::Parenthesis,
                    word => is(word, "pub"),
                });
                for (name, target) in imports(rest, &[]) {
                    if !is_public {
                        module.paths.push(target.clone());
                    }
                    module.names.insert(name, target);
                }
                at += rest.len();
            }
            [TokenTree::Ident(word), rest @ ..] if !before.is_some_and(|token| is(token, ".")) => {
                let segments = rest.chunks(3).map_while(|chunk| match chunk {
                    [a, b, TokenTree::Ident(name)] if is(a, ":") && is(b, ":") => Some(name),
                    _ => None,
                });
                let names: Vec<_> = [word].into_iter().chain(segments).collect();
                at += 3 * (names.len() - 1);
                let names: Vec<_> = names.iter().map(ToString::to_string).collect();
                // In `pub(crate)` it is a visibility.
                if names.len() > 1 || !["crate", "super", "self"].contains(&names[0].as_str()) {
                    module.paths.push(names);
                }
            }
            _ => {}
        }
        at += 1;
    }
    Ok(())
}

fn is(token: &TokenTree, text: &str) -> bool {
    !matches!(token, TokenTree::Group(_)) && token.to_string() == text
}

/// Whether an attribute compiles its item for tests alone.
fn is_for_tests(attribute: &Group) -> bool {
    let text = attribute.stream().to_string().replace(' ', "");
    text == "cfg(test)" || text.starts_with("cfg(all(test,")
}

/// The names of an import, and what they stand for.
fn imports(tokens: &[TokenTree], prefix: &[String]) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let parts = tokens.split(|token| is(token, ","));
    for part in parts.filter(|part| !part.is_empty()) {
        if let Some(TokenTree::Group(group)) = part.last() {
            let path = part
                .iter()
                .filter(|token| matches!(token, TokenTree::Ident(_)));
            let path: Vec<_> = path.map(ToString::to_string).collect();
            found.extend(imports(&inside(group), &[prefix, &path].concat()));
            continue;
        }
        let mut words: Vec<_> = part.iter().map(ToString::to_string).collect();
        words.retain(|word| word != ":");
        let alias = words.iter().position(|word| word == "as");
        let alias = alias.and_then(|at| words.drain(at..).nth(1));
        // `self` stands for the prefix, and `*` for no name of its own.
        words.retain(|word| word != "*" && (word != "self" || prefix.is_empty()));
        let target = [prefix, &words].concat();
        if let Some(name) = alias.or(target.last().cloned()) {
            found.push((name, target));
        }
    }
    found
}
