//! Long source files and functions of a package.

use std::path::Path;

use anyhow::Result;
use proc_macro2::TokenTree;

use super::source::{files, inside, item_end, read};

/// Most lines of a file, documentation and unit tests included.
const MOST_LINES: usize = 600;

/// Most lines of a function, from `fn` to its closing brace, without a reason.
const MOST_FUNCTION_LINES: usize = 80;

/// Starts the comment above a long function, or in its first lines, with the reason.
const REASON: &str = "// Long: ";

/// The lines after `fn`'s body opens in which the reason may be.
const FIRST_LINES: usize = 3;

/// What is too long in a package, a line for each.
pub fn lengths(package: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for file in files(&package.join("src"))? {
        let (text, tokens) = read(&file)?;
        let name = file.strip_prefix(package)?.display();
        let lines: Vec<&str> = text.lines().collect();
        if lines.len() > MOST_LINES {
            found.push(format!(
                "{name}: {} lines, at most {MOST_LINES}",
                lines.len()
            ));
        }
        let mut functions = Vec::new();
        find(&tokens, &mut functions);
        for (function, first, [open, last]) in functions {
            let length = last + 1 - first;
            if length > MOST_FUNCTION_LINES && !has_reason(&lines, first, open) {
                found.push(format!(
                    "{name}:{first}: `{function}` has {length} lines, at most \
                     {MOST_FUNCTION_LINES} without a comment `{REASON}...`"
                ));
            }
        }
    }
    Ok(found)
}

/// A function's name and the lines of its `fn` and of its braces, counted from 1.
type Function = (String, usize, [usize; 2]);

/// Adds the functions that have a body.
fn find(tokens: &[TokenTree], functions: &mut Vec<Function>) {
    for (index, token) in tokens.iter().enumerate() {
        if let TokenTree::Group(group) = token {
            find(&inside(group), functions);
        }
        if let [TokenTree::Ident(word), TokenTree::Ident(name), rest @ ..] = &tokens[index..]
            && word == "fn"
            && let Some(TokenTree::Group(body)) = item_end(rest).map(|end| &rest[end])
        {
            let braces = [body.span_open(), body.span_close()];
            let line = word.span().start().line;
            functions.push((
                name.to_string(),
                line,
                braces.map(|brace| brace.start().line),
            ));
        }
    }
}

/// Whether a comment directly above `fn`, or among the first lines of its body, says why it is long.
fn has_reason(lines: &[&str], first: usize, open: usize) -> bool {
    let above = lines[..first - 1].iter().rev().map(|line| line.trim());
    let above = above.take_while(|line| line.starts_with("//") || line.starts_with('#'));
    let inside = lines
        .iter()
        .skip(open)
        .take(FIRST_LINES)
        .map(|line| line.trim());
    above.chain(inside).any(|line| line.starts_with(REASON))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// What is too long in a package of one file.
    fn of(text: &str) -> Vec<String> {
        let package = tempfile::tempdir().unwrap();
        fs::create_dir(package.path().join("src")).unwrap();
        fs::write(package.path().join("src/lib.rs"), text).unwrap();
        lengths(package.path()).unwrap()
    }

    #[test]
    fn a_file_of_600_lines_passes() {
        assert!(of(&"// one\n".repeat(600)).is_empty());
        assert_eq!(
            of(&"// one\n".repeat(601)),
            ["src/lib.rs: 601 lines, at most 600"]
        );
    }

    #[test]
    fn a_function_of_80_lines_passes_and_a_longer_one_with_a_reason() {
        let function = |above: &str, body: &str, lines: usize| {
            let brace = "    \"}\"; '}'; /* } */\n".repeat(lines - 2);
            of(&format!(
                "impl A {{\n{above}pub fn long(\n) {{\n{body}{brace}}}\n}}\n"
            ))
        };
        assert!(function("", "", 79).is_empty());
        let found = function("", "", 80);
        let wanted =
            "src/lib.rs:2: `long` has 81 lines, at most 80 without a comment `// Long: ...`";
        assert_eq!(found, [wanted]);
        assert!(function("// Long: a table.\n#[inline]\n", "", 90).is_empty());
        assert!(function("", "    // Long: a table.\n", 90).is_empty());
        assert_eq!(
            function("// Long: another's.\nconst A: u8 = 1;\n", "", 90).len(),
            1
        );
    }
}
