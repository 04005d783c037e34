//! Where in a library its functions begin.
//!
//! The library belongs to the process that is looked at, which may have written
//! it: nothing in it is trusted. It is read, not mapped, for its owner could cut
//! it short meanwhile. The crate `object` parses it: it checks all bounds, reads
//! from a file that is not in memory as a whole (libcuda has tens of megabytes),
//! and with only its reader of ELF it needs nothing but memchr.

use std::cell::Cell;
use std::fs::File;
use std::ops::Range;

use object::LittleEndian;
use object::elf::{self, FileHeader64, ProgramHeader64};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader, Sym};
use object::read::{ReadCache, ReadRef, StringTable};

/// Most bytes that are read of one library. The tables of libcuda's dynamic
/// symbols have some 100 kB.
const READ_MAX: u64 = 16 << 20;

/// The processor that the functions must be for: a probe replaces an
/// instruction.
const MACHINE: elf::Machine = if cfg!(target_arch = "aarch64") {
    elf::EM_AARCH64
} else {
    elf::EM_X86_64
};

/// A function and the offset of its first instruction in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Its index among the names that were asked for.
    pub(super) name: usize,
    pub(super) offset: u64,
}

/// The functions of these names that a library exports, each once and in no
/// order. An error says what is wrong with the file.
pub(super) fn functions(file: &File, names: &[&str]) -> Result<Vec<Found>, String> {
    let file = file.try_clone().map_err(|error| error.to_string())?;
    let source = Bounded {
        cache: ReadCache::new(file),
        left: Cell::new(READ_MAX),
    };
    let header = parsed(FileHeader64::<LittleEndian>::parse(&source))?;
    let little = parsed(header.endian())?;
    if header.e_machine(little) != MACHINE {
        return Err("it is for another processor".to_owned());
    }
    let segments = parsed(header.program_headers(little, &source))?;
    let sections = parsed(header.sections(little, &source))?;
    let symbols = parsed(sections.symbols(little, &source, elf::SHT_DYNSYM))?;
    if symbols.is_empty() {
        return Err("it exports nothing".to_owned());
    }
    // At once: through the table, each name would be a read of its own.
    let strings = parsed(sections.section(symbols.string_section()))?;
    let strings = parsed(strings.data(little, &source))?;
    let strings = StringTable::new(strings, 0, strings.len() as u64);
    let length = (&source).len().map_err(|()| "it cannot be read")?;

    let mut found: Vec<Found> = Vec::new();
    for symbol in symbols.iter() {
        // An indirect function's address is that of its resolver.
        if symbol.is_undefined(little) || symbol.st_type() != elf::STT_FUNC {
            continue;
        }
        let symbol_name = strings.get(symbol.st_name(little)).unwrap_or_default();
        let Some(name) = names.iter().position(|name| name.as_bytes() == symbol_name) else {
            continue;
        };
        if found.iter().any(|other| other.name == name) {
            continue;
        }
        let address = symbol.st_value(little);
        let offset = offset_of(address, segments).filter(|offset| *offset < length);
        let offset = offset.ok_or_else(|| format!("{} is not in its code", names[name]))?;
        found.push(Found { name, offset });
    }
    Ok(found)
}

/// Where in the file the code at an address stands.
fn offset_of(address: u64, segments: &[ProgramHeader64<LittleEndian>]) -> Option<u64> {
    let little = LittleEndian;
    segments.iter().find_map(|segment| {
        let is_code =
            segment.p_type(little) == elf::PT_LOAD && segment.p_flags(little).0 & elf::PF_X.0 != 0;
        let distance = address.checked_sub(segment.p_vaddr(little))?;
        let is_inside = is_code && distance < segment.p_filesz(little);
        let offset = segment.p_offset(little).checked_add(distance)?;
        is_inside.then_some(offset)
    })
}

fn parsed<T>(result: object::read::Result<T>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}

/// A file of which no more than so much is read, whatever it says of itself.
struct Bounded {
    cache: ReadCache<File>,
    /// Bytes.
    left: Cell<u64>,
}

impl Bounded {
    fn take(&self, size: u64) -> Result<(), ()> {
        self.left.set(self.left.get().checked_sub(size).ok_or(())?);
        Ok(())
    }
}

impl<'a> ReadRef<'a> for &'a Bounded {
    fn len(self) -> Result<u64, ()> {
        (&self.cache).len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        self.take(size)?;
        (&self.cache).read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        // What the cache reads of a text at most.
        const TEXT_MAX: u64 = 4096;
        self.take(TEXT_MAX)?;
        (&self.cache).read_bytes_at_until(range, delimiter)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use super::*;

    /// An ELF file with one executable segment, 0x400 bytes of the file at address
    /// 0x11000, and the dynamic symbols `name`, `value`.
    fn library(symbols: &[(&str, u64)]) -> Vec<u8> {
        let mut strings = vec![0];
        let mut table = vec![0; 24];
        for (name, value) in symbols {
            let at = u32::try_from(strings.len()).expect("few names");
            table.extend(at.to_le_bytes());
            // STB_GLOBAL and STT_FUNC, section 1.
            table.extend([0x12, 0, 1, 0]);
            table.extend(value.to_le_bytes());
            table.extend(8u64.to_le_bytes());
            strings.extend(name.bytes());
            strings.push(0);
        }
        let mut file = vec![0; 0x1400];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &3u16.to_le_bytes());
        put(18, &MACHINE.0.to_le_bytes());
        put(20, &1u32.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(40, &0x100u64.to_le_bytes());
        for (at, half) in [(52, 64u16), (54, 56), (56, 1), (58, 64), (60, 3), (62, 2)] {
            put(at, &half.to_le_bytes());
        }
        // PT_LOAD, PF_R and PF_X.
        put(64, &1u32.to_le_bytes());
        put(68, &5u32.to_le_bytes());
        for (at, word) in [(72, 0x1000u64), (80, 0x11000), (96, 0x400), (104, 0x400)] {
            put(at, &word.to_le_bytes());
        }
        // Sections: none, SHT_DYNSYM, SHT_STRTAB.
        for (at, kind, offset, size) in [
            (0x140, 11u32, 0x200u64, table.len()),
            (0x180, 3, 0x800, strings.len()),
        ] {
            put(at + 4, &kind.to_le_bytes());
            put(at + 24, &offset.to_le_bytes());
            put(at + 32, &(size as u64).to_le_bytes());
        }
        put(0x140 + 40, &2u32.to_le_bytes());
        put(0x140 + 56, &24u64.to_le_bytes());
        put(0x200, &table);
        put(0x800, &strings);
        file
    }

    fn look(bytes: &[u8], names: &[&str]) -> Result<Vec<Found>, String> {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(bytes).expect("it can be written");
        functions(&file, names)
    }

    #[test]
    fn an_offset_is_that_of_the_file() {
        let bytes = library(&[("other", 0x11000), ("wanted", 0x11080)]);
        let found = look(&bytes, &["absent", "wanted"]);
        let wanted = Found {
            name: 1,
            offset: 0x1080,
        };
        assert_eq!(found, Ok(vec![wanted]));
        assert_eq!(look(&bytes, &["want"]), Ok(Vec::new()));
    }

    #[test]
    fn a_function_outside_the_code_is_refused() {
        for address in [0, 0x10fff, 0x11400, u64::MAX] {
            let bytes = library(&[("wanted", address)]);
            let error = look(&bytes, &["wanted"]).expect_err("it is nowhere");
            assert!(error.contains("wanted"), "{error}");
        }
    }

    #[test]
    fn other_processors_and_other_files_are_refused() {
        let mut bytes = library(&[("wanted", 0x11000)]);
        bytes[18] = 40;
        let error = look(&bytes, &["wanted"]).expect_err("it is for ARM");
        assert!(error.contains("processor"), "{error}");
        for nonsense in [&b""[..], b"#!/bin/sh", &[0x7f; 4096]] {
            look(nonsense, &["wanted"]).expect_err("it is no library");
        }
    }

    #[test]
    fn no_damaged_byte_breaks_the_reader() {
        let whole = library(&[("wanted", 0x11000), ("other", 0x11010)]);
        // The headers and the tables, and each length that cuts them short.
        for at in (0..0x260).chain(0x800..0x810) {
            for value in [0x00, 0x01, 0x7f, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                let _ = look(&bytes, &["wanted"]);
            }
            let found = look(&whole[..at], &["wanted"]);
            assert!(found.is_err(), "{at} bytes are enough: {found:?}");
        }
    }

    #[test]
    fn a_huge_table_of_an_empty_file_is_not_read() {
        let mut bytes = library(&[("wanted", 0x11000)]);
        // 1 TiB of symbols, in a file that has no blocks there.
        bytes[0x140 + 32..0x140 + 40].copy_from_slice(&(3u64 << 38).to_le_bytes());
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(&bytes).expect("it can be written");
        file.seek(SeekFrom::Start(0)).expect("it is a file");
        if let Err(error) = file.set_len(1 << 41) {
            eprintln!("not run: no file of 2 TiB here: {error}");
            return;
        }
        functions(&file, &["wanted"]).expect_err("nobody reads 1 TiB");
    }
}
