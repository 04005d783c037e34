//! What each grammar takes and refuses, and that what is displayed parses back.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use gcgroup_model::ROWS;
use gcgroup_model::row::Grammar;
use gcgroup_model::value::{
    self, FreezeSet, One, PartitionName, PartitionRef, Priority, Quota, SmRequest, Switch,
    ValueError,
};
use proptest::prelude::*;

/// What one text is to a grammar: its display, or the kind of error.
#[derive(Debug, PartialEq)]
enum Verdict {
    Reads(&'static str),
    Invalid,
    Range,
}
use Verdict::{Invalid, Range, Reads};

/// Reads a text as a file of this grammar does and displays what it means.
fn read(grammar: Grammar, written: &[u8]) -> Result<String, ValueError> {
    fn of<V: FromStr<Err = ValueError> + Display>(text: &str) -> Result<String, ValueError> {
        Ok(text.parse::<V>()?.to_string())
    }
    let text = value::text(written, grammar.longest(), grammar.allowed())?;
    match grammar {
        Grammar::Priority => of::<Priority>(text),
        Grammar::Switch => of::<Switch>(text),
        Grammar::Quota => of::<Quota>(text),
        Grammar::PartitionRef => of::<PartitionRef>(text),
        Grammar::SmRequest => of::<SmRequest>(text),
        Grammar::One => of::<One>(text),
        Grammar::FreezeSet => of::<FreezeSet>(text),
        Grammar::Pending => of::<gcgroup_model::change::Pending>(text),
        Grammar::None | Grammar::Spec => panic!("{grammar:?} has no value"),
    }
}

fn check(grammar: Grammar, table: &[(&str, Verdict)]) {
    for (written, verdict) in table {
        let found = match read(grammar, written.as_bytes()) {
            Ok(shown) => {
                let again = read(grammar, shown.as_bytes());
                assert_eq!(again.as_ref(), Ok(&shown), "{shown:?} does not parse back");
                let Reads(expected) = verdict else {
                    panic!("{grammar:?} takes {written:?} as {shown:?}");
                };
                assert_eq!(shown, *expected, "{grammar:?} {written:?}");
                continue;
            }
            Err(ValueError::Invalid { .. }) => Invalid,
            Err(ValueError::Range { .. }) => Range,
        };
        assert_eq!(found, *verdict, "{grammar:?} {written:?}");
    }
}

/// Texts that no grammar takes.
const NEVER: &[&str] = &[
    "", "\n", " ", "\0", "-1", "1\n\n", "\n1", " 1", "1 ", "1\r\n", "1\t", "++1", "+", "\u{661}",
    "\u{e9}", "1;", "1\0",
];

#[test]
fn no_grammar_takes_what_is_malformed() {
    for row in ROWS {
        if !matches!(row.grammar, Grammar::None | Grammar::Spec) {
            for written in NEVER {
                let refused = read(row.grammar, written.as_bytes());
                assert!(
                    matches!(refused, Err(ValueError::Invalid { .. })),
                    "{} {written:?}: {refused:?}",
                    row.name
                );
            }
        }
    }
}

#[test]
fn priorities_are_0_to_15() {
    check(
        Grammar::Priority,
        &[
            ("0", Reads("0")),
            ("8\n", Reads("8")),
            ("+15", Reads("15")),
            ("007", Reads("7")),
            ("16", Invalid),
            ("256", Invalid),
            ("18446744073709551615", Invalid),
            ("18446744073709551616", Range),
            ("99999999999999999999999999999\n", Range),
            ("max", Invalid),
            ("0x1", Invalid),
            ("1.0", Invalid),
            ("1e1", Invalid),
        ],
    );
}

#[test]
fn switches_are_0_or_1() {
    check(
        Grammar::Switch,
        &[
            ("0", Reads("0")),
            ("1\n", Reads("1")),
            ("+1", Reads("1")),
            ("01", Reads("1")),
            ("2", Invalid),
            ("on", Invalid),
            ("true", Invalid),
            ("18446744073709551616", Range),
        ],
    );
}

#[test]
fn quotas_are_max_or_microseconds_with_an_optional_period() {
    check(
        Grammar::Quota,
        &[
            ("max", Reads("max 100000")),
            ("max\n", Reads("max 100000")),
            ("max 50000", Reads("max 50000")),
            ("20000", Reads("20000 100000")),
            ("+20000 +100000\n", Reads("20000 100000")),
            ("1000 10000", Reads("1000 10000")),
            ("1000 1000000", Reads("1000 1000000")),
            ("200000 100000", Reads("200000 100000")),
            ("18446744073709551615", Reads("18446744073709551615 100000")),
            ("999", Invalid),
            ("0", Invalid),
            ("20000 9999", Invalid),
            ("20000 1000001", Invalid),
            ("max 0", Invalid),
            ("20000  100000", Invalid),
            ("20000\t100000", Invalid),
            ("20000 100000 1", Invalid),
            ("20000 max", Invalid),
            ("MAX", Invalid),
            ("18446744073709551616", Range),
            ("1000 18446744073709551616", Range),
        ],
    );
}

#[test]
fn partitions_are_none_or_a_name() {
    check(
        Grammar::PartitionRef,
        &[
            ("none", Reads("none")),
            ("none\n", Reads("none")),
            ("a", Reads("a")),
            ("0", Reads("0")),
            ("be-1.x_y\n", Reads("be-1.x_y")),
            (
                "abcdefghijklmnopqrstuvwxyz01234",
                Reads("abcdefghijklmnopqrstuvwxyz01234"),
            ),
            ("abcdefghijklmnopqrstuvwxyz012345", Invalid),
            ("Be", Invalid),
            ("None", Invalid),
            (".", Invalid),
            ("..", Invalid),
            ("-a", Invalid),
            ("_a", Invalid),
            ("a/b", Invalid),
        ],
    );
    let name: Result<PartitionName, _> = "none".parse();
    assert!(name.is_err(), "a partition must not be called none");
}

#[test]
fn counts_of_sms_are_numbers_or_max() {
    check(
        Grammar::SmRequest,
        &[
            ("max", Reads("max")),
            ("max\n", Reads("max")),
            ("0", Reads("0")),
            ("+64", Reads("64")),
            ("4294967295", Reads("4294967295")),
            ("4294967296", Invalid),
            ("18446744073709551616", Range),
            ("64 SMs", Invalid),
        ],
    );
}

#[test]
fn the_only_command_is_1() {
    check(
        Grammar::One,
        &[
            ("1", Reads("1")),
            ("+1\n", Reads("1")),
            ("0", Invalid),
            ("2", Invalid),
            ("18446744073709551616", Range),
        ],
    );
}

#[test]
fn several_are_frozen_by_a_state_and_their_pids() {
    check(
        Grammar::FreezeSet,
        &[
            ("1 7", Reads("1 7")),
            ("0 7 8 9\n", Reads("0 7 8 9")),
            ("+1 +7", Reads("1 7")),
            ("1", Invalid),
            ("1 ", Invalid),
            ("1  7", Invalid),
            ("1 7 ", Invalid),
            ("2 7", Invalid),
            ("1 7 7", Invalid),
            ("1 7 x", Invalid),
            ("1 -7", Invalid),
            ("1 4294967296", Invalid),
            ("1 18446744073709551616", Range),
        ],
    );
}

#[test]
fn a_write_has_31_bytes_at_most_where_its_file_is_not_for_lists() {
    let longest = "0000000000000000000000000000001";
    assert_eq!(longest.len(), 31);
    for grammar in [
        Grammar::Priority,
        Grammar::Switch,
        Grammar::One,
        Grammar::SmRequest,
    ] {
        assert!(read(grammar, longest.as_bytes()).is_ok(), "{grammar:?}");
        let longer = format!("{longest}\n");
        assert!(
            matches!(
                read(grammar, longer.as_bytes()),
                Err(ValueError::Invalid { .. })
            ),
            "{grammar:?}"
        );
    }
    let many: Vec<_> = (1..2000).map(|pid: u32| pid.to_string()).collect();
    let many = format!("1 {}", many.join(" "));
    assert_eq!(read(Grammar::FreezeSet, many.as_bytes()), Ok(many.clone()));
}

#[test]
fn bytes_take_a_suffix_and_overflow_is_a_range_error() {
    for (text, bytes) in [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1 << 10),
        ("1k", 1 << 10),
        ("3M", 3 << 20),
        ("8G", 8 << 30),
        ("+2T", 2 << 40),
        ("16777215T", 16_777_215 << 40),
    ] {
        assert_eq!(value::bytes(text, ""), Ok(bytes), "{text}");
    }
    for text in ["", "K", "1KB", "1 K", "1.5G", "-1", "1P", "KK"] {
        let refused = value::bytes(text, "");
        assert!(matches!(refused, Err(ValueError::Invalid { .. })), "{text}");
    }
    for text in ["16777216T", "18446744073709551616"] {
        let refused = value::bytes(text, "");
        assert!(matches!(refused, Err(ValueError::Range { .. })), "{text}");
    }
}

#[test]
fn an_error_says_what_was_found_and_what_is_allowed() {
    let error = "17".parse::<Priority>().expect_err("it is out of range");
    let message = error.to_string();
    assert!(message.contains("\"17\""), "{message}");
    assert!(message.contains("0 to 15"), "{message}");
    let error = value::text(&[0xff; 1000], 31, "anything").expect_err("it is too long");
    assert!(
        error.to_string().len() < 400,
        "a long write makes a short message"
    );
}

/// Shows, parses back and shows again.
fn round_trip<V>(value: &V) -> Result<(), TestCaseError>
where
    V: Display + Debug + PartialEq + FromStr<Err = ValueError>,
{
    let again = value.to_string().parse::<V>();
    prop_assert_eq!(again.as_ref(), Ok(value));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_shown_can_be_written_back(
        priority in 0_u8..=15,
        on in any::<bool>(),
        quota_usec in prop::option::of(Quota::LEAST_USEC..),
        period_usec in Quota::PERIOD_USEC,
        name in "[a-z0-9][a-z0-9._-]{0,30}",
        count in any::<u32>(),
        pids in prop::collection::hash_set(any::<u32>(), 1..50),
    ) {
        round_trip(&Priority::new(priority).expect("it is in range"))?;
        round_trip(&Switch::from(on))?;
        round_trip(&Quota { quota_usec, period_usec })?;
        round_trip(&SmRequest::Count(count))?;
        round_trip(&SmRequest::Max)?;
        round_trip(&One)?;
        round_trip(&FreezeSet { state: on.into(), pids: pids.into_iter().collect() })?;
        round_trip(&PartitionRef::None)?;
        if let Ok(name) = name.parse::<PartitionName>() {
            round_trip(&name)?;
            round_trip(&PartitionRef::Named(name))?;
        } else {
            prop_assert_eq!(name, "none");
        }
    }

    #[test]
    fn no_bytes_make_a_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        for row in ROWS {
            if !matches!(row.grammar, Grammar::None | Grammar::Spec) {
                let _ = read(row.grammar, &bytes);
            }
        }
        let _ = value::bytes(&String::from_utf8_lossy(&bytes), "");
    }

    #[test]
    fn what_is_taken_is_shown_as_something_that_is_taken(text in "[+0-9a-z .\n-]{0,12}") {
        for row in ROWS {
            if matches!(row.grammar, Grammar::None | Grammar::Spec) {
                continue;
            }
            if let Ok(shown) = read(row.grammar, text.as_bytes()) {
                prop_assert_eq!(read(row.grammar, shown.as_bytes()), Ok(shown));
            }
        }
    }
}
