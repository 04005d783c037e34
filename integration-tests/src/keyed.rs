//! Keyed files: `key: value` and `key value` lines.

use std::collections::BTreeMap;

/// The lines of a keyed file in their order. `gcgroup.stat` separates with
/// `: `, the others with a space.
///
/// # Errors
/// The line that has no value.
pub fn lines(text: &str) -> Result<Vec<(&str, &str)>, String> {
    text.lines()
        .map(|line| {
            line.split_once(": ")
                .or_else(|| line.split_once(' '))
                .ok_or_else(|| format!("{line:?} has no value"))
        })
        .collect()
}

/// The numbers of a keyed file by key.
///
/// # Errors
/// The line that is not a key and a number, or the key that stands twice.
pub fn numbers(text: &str) -> Result<BTreeMap<String, u64>, String> {
    let mut found = BTreeMap::new();
    for (key, value) in lines(text)? {
        let value = value
            .parse()
            .map_err(|_| format!("{key:?} is {value:?}, not a number"))?;
        if found.insert(key.to_owned(), value).is_some() {
            return Err(format!("{key:?} stands twice"));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_separators_are_read() {
        let found = numbers("a: 1\nb 2\n").expect("well-formed");
        assert_eq!(found.get("a"), Some(&1));
        assert_eq!(found.get("b"), Some(&2));
    }

    #[test]
    fn half_a_line_and_a_repeated_key_are_errors() {
        for torn in ["a: 1\nb", "a: x", "a: 1\na: 2"] {
            assert!(numbers(torn).is_err(), "{torn:?}");
        }
    }
}
