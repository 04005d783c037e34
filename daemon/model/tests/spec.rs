//! What gcgroup.launch takes and refuses, field by field.

use gcgroup_model::WorkloadSpec;
use gcgroup_model::spec::{Barrier, Blocks, FIELDS, FieldKind};
use gcgroup_model::value::{PartitionRef, Priority, Quota};
use proptest::prelude::*;

/// A spec of one field beside the kernel.
fn with(field: &str, value: &str) -> Result<WorkloadSpec, String> {
    let text = format!("{{\"kernel\": \"k\", \"{field}\": {value}}}");
    WorkloadSpec::parse(&text).map_err(|error| error.field)
}

fn sleep(edit: impl FnOnce(&mut WorkloadSpec)) -> WorkloadSpec {
    let mut spec = WorkloadSpec::of_kernel("k");
    edit(&mut spec);
    spec
}

#[test]
fn the_example_of_the_interface_is_read_whole() {
    let text = r#"
        {"name": "noisy", "gpu": 1, "kernel": "fma_fp32", "ilp": 4, "blocks": 132, "threads": 1024,
         "iterations": null, "sliced": true, "duration": "30s", "bytes": "8G", "partition": "be",
         "priority": 10, "memory_limit": "6G", "compute_max": "20000 100000", "barrier": null}"#;
    let expected = WorkloadSpec {
        name: Some("noisy".to_owned()),
        gpu: 1,
        kernel: "fma_fp32".to_owned(),
        ilp: Some(4),
        blocks: Some(Blocks::Count(132)),
        threads: Some(1024),
        iterations: None,
        sliced: true,
        duration_ms: Some(30_000),
        bytes: Some(8 << 30),
        partition: PartitionRef::Named("be".parse().expect("it is a name")),
        priority: Priority::new(10).expect("it is in range"),
        memory_limit: Some(6 << 30),
        compute_max: Quota {
            quota_usec: Some(20_000),
            period_usec: 100_000,
        },
        barrier: None,
    };
    assert_eq!(WorkloadSpec::parse(text), Ok(expected));
}

#[test]
fn only_the_kernel_must_be_given() {
    let read = WorkloadSpec::parse("{\"kernel\": \"k\"}").expect("it is enough");
    assert_eq!(read, WorkloadSpec::of_kernel("k"));
    assert_eq!((read.gpu, read.sliced), (0, true));
    assert_eq!(read.priority.get(), 8);
    let missing = WorkloadSpec::parse("{}").expect_err("it is not");
    assert_eq!(missing.field, "kernel");
}

#[test]
fn every_field_takes_its_values() {
    let text = |value: &str| Some(value.to_owned());
    for (field, value, expected) in [
        ("name", "\"A.b_c-1\"", sleep(|s| s.name = text("A.b_c-1"))),
        ("gpu", "7", sleep(|s| s.gpu = 7)),
        ("ilp", "2", sleep(|s| s.ilp = Some(2))),
        ("blocks", "1", sleep(|s| s.blocks = Some(Blocks::Count(1)))),
        (
            "blocks",
            "\"per-sm:2\"",
            sleep(|s| s.blocks = Some(Blocks::PerSm(2))),
        ),
        ("threads", "32", sleep(|s| s.threads = Some(32))),
        ("iterations", "1", sleep(|s| s.iterations = Some(1))),
        ("sliced", "false", sleep(|s| s.sliced = false)),
        (
            "duration",
            "\"500ms\"",
            sleep(|s| s.duration_ms = Some(500)),
        ),
        (
            "duration",
            "\"5m\"",
            sleep(|s| s.duration_ms = Some(300_000)),
        ),
        (
            "duration",
            "\"720h\"",
            sleep(|s| s.duration_ms = Some(2_592_000_000)),
        ),
        ("bytes", "4096", sleep(|s| s.bytes = Some(4096))),
        ("bytes", "\"1K\"", sleep(|s| s.bytes = Some(1024))),
        ("partition", "\"none\"", sleep(|_| {})),
        (
            "priority",
            "0",
            sleep(|s| s.priority = Priority::new(0).expect("in range")),
        ),
        (
            "memory_limit",
            "\"6G\"",
            sleep(|s| s.memory_limit = Some(6 << 30)),
        ),
        ("compute_max", "\"max\"", sleep(|_| {})),
        (
            "barrier",
            "\"a:b:3\"",
            sleep(|s| {
                let name = "a:b".to_owned();
                s.barrier = Some(Barrier { name, count: 3 });
            }),
        ),
    ] {
        assert_eq!(with(field, value), Ok(expected), "{field}: {value}");
    }
}

#[test]
fn a_value_that_is_wrong_names_its_field() {
    for (field, value) in [
        ("name", "7"),
        ("name", "\"\""),
        ("name", "\"a/b\""),
        ("name", "\"..\""),
        ("name", "\".a\""),
        ("name", "\"a b\""),
        ("gpu", "-1"),
        ("gpu", "0.5"),
        ("gpu", "\"0\""),
        ("gpu", "4294967296"),
        ("ilp", "true"),
        ("blocks", "0"),
        ("blocks", "\"per-sm:0\""),
        ("blocks", "\"per-sm:\""),
        ("blocks", "\"132\""),
        ("blocks", "4294967296"),
        ("threads", "1.0"),
        ("iterations", "0"),
        ("sliced", "1"),
        ("sliced", "\"true\""),
        ("duration", "30"),
        ("duration", "\"30\""),
        ("duration", "\"0s\""),
        ("duration", "\"1.5s\""),
        ("duration", "\"s\""),
        ("duration", "\"721h\""),
        ("duration", "\"99999999999999999999h\""),
        ("bytes", "\"8GB\""),
        ("bytes", "-1"),
        ("bytes", "\"16777216T\""),
        ("partition", "\"Big\""),
        ("partition", "0"),
        ("priority", "16"),
        ("priority", "\"8\""),
        ("memory_limit", "\"lots\""),
        ("compute_max", "20000"),
        ("compute_max", "\"20000 1\""),
        ("barrier", "\"a\""),
        ("barrier", "\":2\""),
        ("barrier", "\"a:1\""),
        ("barrier", "\"a:65\""),
        ("colour", "1"),
    ] {
        assert_eq!(
            with(field, value),
            Err(field.to_owned()),
            "{field}: {value}"
        );
    }
    let kernel = WorkloadSpec::parse("{\"kernel\": 7}").expect_err("it is no name");
    assert_eq!(kernel.field, "kernel");
}

#[test]
fn what_is_no_object_has_no_field_at_fault() {
    for text in [
        "",
        "7",
        "[]",
        "null",
        "{",
        "{kernel}",
        "{} {}",
        "{\"kernel\": \"k\",}",
    ] {
        let error = WorkloadSpec::parse(text).expect_err("it is no object");
        assert_eq!(error.field, "", "{text}");
    }
}

#[test]
fn a_field_that_is_null_is_left_out() {
    for field in FIELDS.iter().filter(|field| field.name != "kernel") {
        let read = with(field.name, "null");
        assert_eq!(read, Ok(WorkloadSpec::of_kernel("k")), "{}", field.name);
    }
}

#[test]
fn each_field_is_of_the_kind_that_the_table_says() {
    for field in FIELDS.iter().filter(|field| field.name != "kernel") {
        // No field takes an object, and only a flag takes true.
        assert_eq!(with(field.name, "{}"), Err(field.name.to_owned()));
        let flag = with(field.name, "true").is_ok();
        assert_eq!(flag, field.kind == FieldKind::Flag, "{}", field.name);
        let number = with(field.name, "2").is_ok();
        let takes_number = matches!(field.kind, FieldKind::Number | FieldKind::NumberOrText);
        assert_eq!(number, takes_number, "{}", field.name);
    }
}

#[test]
fn the_interference_suites_configuration_means_the_same() {
    let read = WorkloadSpec::parse(
        r#"{"kernel_name": "fma_fp32_ilp4", "init_args": {"shared_lib": "x.so"},
            "run_args": {"num_tb": 132, "num_threads_per_block": 1024, "num_itrs": 1000}}"#,
    );
    let expected = WorkloadSpec {
        ilp: Some(4),
        blocks: Some(Blocks::Count(132)),
        threads: Some(1024),
        iterations: Some(1000),
        sliced: false,
        ..WorkloadSpec::of_kernel("fma_fp32")
    };
    assert_eq!(read, Ok(expected));
    let read = WorkloadSpec::parse(
        r#"{"kernel_name": "copy_kernel", "init_args": {"num_floats": 1024}, "run_args": {}}"#,
    );
    let read = read.expect("it is a copy");
    assert_eq!((read.kernel.as_str(), read.bytes), ("copy", Some(8192)));
    for (text, field) in [
        (r#"{"kernel_name": 1}"#, "kernel_name"),
        (
            r#"{"kernel_name": "sleep_kernel", "run_args": 1}"#,
            "run_args",
        ),
        (
            r#"{"kernel_name": "sleep_kernel", "run_args": {"x": 1}}"#,
            "x",
        ),
        (
            r#"{"kernel_name": "sleep_kernel", "priority": 1}"#,
            "priority",
        ),
        (
            r#"{"kernel_name": "copy_kernel", "init_args": {"num_floats": 18446744073709551615}}"#,
            "num_floats",
        ),
    ] {
        let error = WorkloadSpec::parse(text).expect_err("it is wrong");
        assert_eq!(error.field, field, "{text}");
    }
}

prop_compose! {
    fn spec()(
        name in prop::option::of("[A-Za-z0-9][A-Za-z0-9._-]{0,62}"),
        kernel in "[a-z0-9_\"\\\\\u{e9}]{1,12}",
        numbers in any::<(u32, Option<u32>, Option<u32>)>(),
        blocks in prop::option::of((any::<bool>(), 1_u32..)),
        iterations in prop::option::of(1_u64..),
        sliced in any::<bool>(),
        duration_ms in prop::option::of(1_u64..=2_592_000_000),
        bytes in any::<(Option<u64>, Option<u64>)>(),
        partition in prop::option::of("[a-z0-9][a-z0-9._-]{0,8}"),
        priority in 0_u8..=15,
        quota_usec in prop::option::of(1000_u64..1_000_000),
        period_usec in 10_000_u64..=1_000_000,
        barrier in prop::option::of(("[a-z:]{1,20}", 2_u32..=64)),
    ) -> WorkloadSpec {
        WorkloadSpec {
            name,
            gpu: numbers.0,
            kernel,
            ilp: numbers.1,
            blocks: blocks.map(|(per_sm, count)| match per_sm {
                true => Blocks::PerSm(count),
                false => Blocks::Count(count),
            }),
            threads: numbers.2,
            iterations,
            sliced,
            duration_ms,
            bytes: bytes.0,
            partition: partition
                .and_then(|name| name.parse().ok())
                .map_or(PartitionRef::None, PartitionRef::Named),
            priority: Priority::new(priority).expect("it is in range"),
            memory_limit: bytes.1,
            compute_max: Quota { quota_usec, period_usec },
            barrier: barrier.map(|(name, count)| Barrier { name, count }),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_spec_that_is_shown_reads_as_the_same(spec in spec()) {
        prop_assert_eq!(WorkloadSpec::parse(&spec.to_json()), Ok(spec));
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "[{}\\[\\]\":,a-z0-9 \\\\\u{e9}]{0,40}") {
        let _ = WorkloadSpec::parse(&text);
        let _ = WorkloadSpec::parse(&format!("{{\"kernel\": \"k\", {text}}}"));
    }
}
