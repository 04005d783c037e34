//! The files of the repository, and Rust code without its comments and texts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use gcgroup_integration_tests::binary::workspace;

/// Modules of unit tests that are files of their own and not called `tests`.
const TEST_MODULES: [&str; 1] = ["fs/src/naive.rs"];

/// A file with its path below the root of the repository.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
}

impl Source {
    pub(crate) fn extension(&self) -> &str {
        let name = Path::new(&self.path).extension();
        name.and_then(|extension| extension.to_str()).unwrap_or("")
    }

    pub(crate) fn is_rust(&self) -> bool {
        self.extension() == "rs"
    }

    /// Whether it is one of these files or below one of these directories.
    pub(crate) fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| {
            let rest = self.path.strip_prefix(place);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }

    /// Whether it is made by a program, which answers for its form.
    pub(crate) fn is_generated(&self) -> bool {
        self.path == "Cargo.lock" || self.extension() == "ptx"
    }

    /// Whether it is compiled for tests alone.
    pub(crate) fn is_test(&self) -> bool {
        TEST_MODULES.contains(&self.path.as_str())
            || self.path.contains("tests/")
            || self.path.ends_with("/tests.rs")
    }

    /// The part before the unit tests, which stand last in a file.
    pub(crate) fn product(&self) -> &str {
        let tests = self.text.find("#[cfg(test)]\nmod tests");
        tests.map_or(self.text.as_str(), |end| &self.text[..end])
    }
}

/// Every text file that is in the repository or would be added to it. Without
/// git, everything but build outputs and caches.
pub(crate) fn all() -> Vec<Source> {
    let root = workspace();
    let mut paths = listed_by_git().unwrap_or_else(|| {
        let mut found = Vec::new();
        walk(root, Path::new(""), &mut found);
        found
    });
    paths.sort();
    let read = |path: PathBuf| {
        let bytes = fs::read(root.join(&path)).ok()?;
        Some(Source {
            path: path.to_string_lossy().into_owned(),
            text: String::from_utf8(bytes).ok()?,
        })
    };
    let found: Vec<_> = paths.into_iter().filter_map(read).collect();
    assert!(found.len() > 50, "only {} files were found", found.len());
    found
}

fn listed_by_git() -> Option<Vec<PathBuf>> {
    let output = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .current_dir(workspace())
        .output()
        .ok()?;
    let listed = String::from_utf8(output.stdout).ok()?;
    let paths = listed.split('\0').filter(|path| !path.is_empty());
    output
        .status
        .success()
        .then(|| paths.map(PathBuf::from).collect())
}

fn walk(root: &Path, below: &Path, found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(root.join(below)).expect("the repository can be read");
    for entry in entries {
        let entry = entry.expect("the repository can be read");
        let name = entry.file_name();
        let path = below.join(&name);
        let kind = entry.file_type().expect("the repository can be read");
        if kind.is_file() {
            found.push(path);
        } else if kind.is_dir()
            && !["target", ".git", "__pycache__"]
                .iter()
                .any(|skip| name == *skip)
        {
            walk(root, &path, found);
        }
    }
}

/// What is skipped until it ends.
#[derive(Clone, Copy, PartialEq)]
enum Skip {
    Nothing,
    Line,
    Block(usize),
    Text,
    RawText(usize),
}

/// Rust code with each comment and text literal blanked out; lines stay where
/// they are.
pub(crate) fn code(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let (mut skip, mut at) = (Skip::Nothing, 0);
    while at < characters.len() {
        let (then, taken) = step(skip, &characters[at..]);
        let passed = &characters[at..characters.len().min(at + taken)];
        let keep = skip == Skip::Nothing && then == Skip::Nothing && taken == 1;
        out.extend(
            passed
                .iter()
                .map(|&c| if keep || c == '\n' { c } else { ' ' }),
        );
        (skip, at) = (then, at + taken);
    }
    out
}

/// What is skipped after the next characters, and how many those are.
fn step(skip: Skip, rest: &[char]) -> (Skip, usize) {
    let (now, next) = (rest[0], rest.get(1).copied().unwrap_or('\0'));
    match skip {
        Skip::Nothing => match (now, next) {
            ('/', '/') => (Skip::Line, 2),
            ('/', '*') => (Skip::Block(1), 2),
            ('"', _) => (Skip::Text, 1),
            ('\'', _) => (Skip::Nothing, character_literal(rest)),
            ('r', '"' | '#') => match raw_hashes(&rest[1..]) {
                Some(hashes) => (Skip::RawText(hashes), hashes + 2),
                None => (Skip::Nothing, 1),
            },
            _ => (Skip::Nothing, 1),
        },
        Skip::Line if now == '\n' => (Skip::Nothing, 1),
        Skip::Line => (Skip::Line, 1),
        Skip::Block(depth) => match (now, next) {
            ('*', '/') if depth == 1 => (Skip::Nothing, 2),
            ('*', '/') => (Skip::Block(depth - 1), 2),
            ('/', '*') => (Skip::Block(depth + 1), 2),
            _ => (skip, 1),
        },
        Skip::Text => match now {
            '\\' => (skip, 2),
            '"' => (Skip::Nothing, 1),
            _ => (skip, 1),
        },
        Skip::RawText(hashes) => {
            let after = rest.get(1..=hashes);
            let ends = now == '"' && after.is_some_and(|after| after.iter().all(|&c| c == '#'));
            if ends {
                (Skip::Nothing, hashes + 1)
            } else {
                (skip, 1)
            }
        }
    }
}

/// Hashes of a raw text literal that begins here, behind its `r`.
fn raw_hashes(rest: &[char]) -> Option<usize> {
    let hashes = rest.iter().take_while(|&&c| c == '#').count();
    (rest.get(hashes) == Some(&'"')).then_some(hashes)
}

/// Characters of the literal that begins with this quote; 1 for a lifetime.
fn character_literal(rest: &[char]) -> usize {
    match rest {
        ['\'', '\\', ..] => {
            let end = rest.iter().skip(3).position(|&c| c == '\'');
            end.map_or(1, |end| end + 4)
        }
        ['\'', _, '\'', ..] => 3,
        _ => 1,
    }
}

/// Whether a word stands in the code, apart from longer words.
pub(crate) fn has_word(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .any(|(at, _)| !code[..at].ends_with(part) && !code[at + word.len()..].starts_with(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_texts_are_no_code() {
        for text in [
            "// unsafe",
            "/* a /* unsafe */ unsafe */",
            "\"a \\\" unsafe\"",
            "r#\"\" unsafe\"#",
            "b\"unsafe\"",
            "'\\'' // unsafe",
        ] {
            assert!(!has_word(&code(text), "unsafe"), "{text}");
        }
        for text in [
            "/* a */ unsafe {",
            "'\"' unsafe",
            "&'a unsafe",
            "\"\" unsafe",
            "r\"\\\" unsafe",
        ] {
            assert!(has_word(&code(text), "unsafe"), "{text}");
        }
        assert!(!has_word("unsafe_code not_unsafe", "unsafe"));
        assert_eq!(code("a\n\"x\ny\"\n// z\nb").lines().count(), 5);
    }
}
