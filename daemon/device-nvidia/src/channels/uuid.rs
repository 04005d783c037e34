//! UUIDs of GPUs, as RM has them and as NVML writes them.

use std::fmt;

/// Sixteen bytes, in the order of the text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Uuid(pub(super) [u8; 16]);

/// What NVML puts before the UUID of a whole GPU.
const PREFIX: &str = "GPU-";

/// Hexadecimal digits between the dashes.
const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];

impl Uuid {
    /// Reads NVML's text, `GPU-` and 32 digits in five groups; `None` for
    /// anything else, such as the UUID of a MIG instance.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let groups: Vec<&str> = text.strip_prefix(PREFIX)?.split('-').collect();
        if !groups.iter().map(|group| group.len()).eq(GROUPS) {
            return None;
        }
        let digits: Vec<u32> = groups
            .concat()
            .chars()
            .map(|digit| digit.to_digit(16))
            .collect::<Option<_>>()?;
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = (pair[0] << 4 | pair[1]) as u8;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        let mut bytes = self.0.iter();
        for group in GROUPS {
            f.write_str("-")?;
            for byte in bytes.by_ref().take(group / 2) {
                write!(f, "{byte:02x}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_bytes_are_the_same_uuid() {
        let text = "GPU-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0";
        let uuid = Uuid::parse(text).expect("it is one");
        assert_eq!(uuid.0[..4], [0x0f, 0x1e, 0x2d, 0x3c]);
        assert_eq!(uuid.0[15], 0xf0);
        assert_eq!(uuid.to_string(), text);
        let capital = text[4..].to_uppercase();
        assert_eq!(Uuid::parse(&format!("GPU-{capital}")), Some(uuid));
    }

    #[test]
    fn other_texts_are_no_uuid() {
        for text in [
            "",
            "GPU-",
            "GPU-0",
            "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0",
            "MIG-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0",
            "GPU-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f",
            "GPU-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0-",
            "GPU-0f1e2d3c4b5a-6978-8796-a5b4c3d2e1f0",
            "GPU-0f1e2d3g-4b5a-6978-8796-a5b4c3d2e1f0",
            "GPU-0f1e2d3\u{e9}-4b5a-6978-8796-a5b4c3d2e1f0",
        ] {
            assert_eq!(Uuid::parse(text), None, "{text}");
        }
    }
}
