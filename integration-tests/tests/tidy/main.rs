//! The rules of the house that no compiler knows, checked by reading the
//! repository.

mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use gcgroup_integration_tests::binary::workspace;
use gcgroup_model::ROWS;

use source::{Source, all, code, has_word};

/// The bound of a file's lines.
const LONGEST_FILE: usize = 600;
/// The bound of a function's lines.
const LONGEST_FUNCTION: usize = 70;

/// Tables, which may be as long as what they list: the file, the function
/// where it is one, and what it lists.
const TABLES: [(&str, &str, &str); 3] = [
    (
        "fs/src/table.rs",
        "behaviour",
        "an arm for each control file",
    ),
    ("fs/src/naive.rs", "naive", "each directory with its files"),
    (
        "fs/src/naive.rs",
        "naive_entry",
        "each file of a process with its text",
    ),
];

/// Kernels that no workload names: `fill` makes the contents of buffers.
const HELPERS: [&str; 1] = ["fill"];

/// Fails with every finding at once.
#[track_caller]
fn assert_none(rule: &str, findings: Vec<String>) {
    assert!(findings.is_empty(), "{rule}:\n  {}", findings.join("\n  "));
}

/// A finding for each line that breaks a rule.
fn lines_that(sources: &[Source], breaks: impl Fn(&Source, &str) -> bool) -> Vec<String> {
    let mut findings = Vec::new();
    for source in sources {
        for (index, line) in source.text.lines().enumerate() {
            if breaks(source, line) {
                findings.push(format!("{}:{}: {}", source.path, index + 1, line.trim()));
            }
        }
    }
    findings
}

#[test]
fn the_top_level_has_what_it_should_and_nothing_else() {
    const EXPECTED: [&str; 15] = [
        ".ci",
        ".gitignore",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE-APACHE",
        "LICENSE-MIT",
        "README.md",
        "daemon",
        "docs",
        "fs",
        "integration-tests",
        "kernels",
        "systemd",
    ];
    let sources = all();
    let names: BTreeSet<_> = sources
        .iter()
        .filter_map(|source| source.path.split('/').next())
        .collect();
    assert_eq!(names.into_iter().collect::<Vec<_>>(), EXPECTED);
}

#[test]
fn fuser_is_used_in_the_session_alone() {
    let sources = all();
    let rust = sources.iter().filter(|source| source.is_rust());
    let findings = rust
        // The example measures a bare filesystem beside ours.
        .filter(|source| !source.is_in(&["fs/src/session.rs", "fs/src/session", "fs/examples"]))
        .filter(|source| has_word(&code(&source.text), "fuser"))
        .map(|source| source.path.clone());
    assert_none(
        "fuser is imported in fs/src/session alone",
        findings.collect(),
    );
}

#[test]
fn unsafe_code_stands_where_a_library_of_c_is_called() {
    let sources = all();
    let rust = sources.iter().filter(|source| source.is_rust());
    let findings = rust
        .filter(|source| !source.is_in(&["daemon/device-nvidia", "kernels/cuda"]))
        .filter(|source| has_word(&code(&source.text), "unsafe"))
        .map(|source| source.path.clone());
    assert_none(
        "unsafe stands in device-nvidia and kernels/cuda alone",
        findings.collect(),
    );
}

#[test]
fn files_and_functions_are_short() {
    let sources = all();
    let mut findings = Vec::new();
    for source in sources.iter().filter(|source| !source.is_generated()) {
        let lines = source.text.lines().count();
        let table = TABLES
            .iter()
            .any(|(path, function, _)| *path == source.path && function.is_empty());
        let program = ["rs", "cu", "cuh", "c", "py", "sh", ""].contains(&source.extension());
        if program && lines > LONGEST_FILE && !table && !source.path.starts_with("LICENSE") {
            findings.push(format!("{} has {lines} lines", source.path));
        }
        if source.is_rust() {
            findings.extend(long_functions(source));
        }
    }
    assert_none("files have at most 600 lines and functions 70", findings);
}

/// Functions with too many lines; rustfmt puts the closing brace of each below
/// the beginning of its first line.
fn long_functions(source: &Source) -> Vec<String> {
    let code = code(&source.text);
    let lines: Vec<_> = code.lines().collect();
    let mut findings = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let Some(name) = function_name(line) else {
            continue;
        };
        let closing = format!("{}}}", &line[..indent]);
        let length = lines[start..]
            .iter()
            .position(|line| line.trim_end() == closing)
            .map_or(0, |end| end + 1);
        let table = TABLES
            .iter()
            .any(|(path, function, _)| *path == source.path && *function == name);
        if length > LONGEST_FUNCTION && !table {
            findings.push(format!(
                "{}:{}: {name} has {length} lines",
                source.path,
                start + 1
            ));
        }
    }
    findings
}

fn function_name(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace();
    let qualifiers = [
        "pub",
        "pub(crate)",
        "pub(super)",
        "const",
        "async",
        "unsafe",
        "extern",
        "\"C\"",
    ];
    let keyword = words.find(|word| !qualifiers.contains(word))?;
    // A body on the same line is short.
    if keyword != "fn" || line.trim_end().ends_with(['}', ';']) {
        return None;
    }
    words.next()?.split(['(', '<']).next()
}

#[test]
fn nothing_is_left_to_do() {
    // Written so that this file does not find itself.
    let words = ["TO_DO", "FIX_ME", "X_X_X"].map(|word| word.replace('_', ""));
    let mut sources = all();
    sources.retain(|source| !source.is_generated());
    let findings = lines_that(&sources, |_, line| {
        words.iter().any(|word| has_word(line, word))
    });
    assert_none("what is to be done is an issue, not a comment", findings);
}

#[test]
fn sources_are_ascii() {
    let mut sources = all();
    sources.retain(|source| !["md"].contains(&source.extension()));
    let findings = lines_that(&sources, |_, line| !line.is_ascii());
    assert_none("sources are ASCII", findings);
}

#[test]
fn no_file_names_a_place_of_one_machine() {
    let places =
        ["/wo_rk/", "/ho_me/", "/ro_ot/", "/Us_ers/", "/tmp/_"].map(|word| word.replace('_', ""));
    let mut sources = all();
    sources.retain(|source| !source.is_generated());
    let findings = lines_that(&sources, |_, line| {
        places[..4].iter().any(|place| {
            line.match_indices(place.as_str()).any(|(at, _)| {
                // A relative path or an address has more in front of it.
                !line[..at].ends_with(|c: char| c.is_alphanumeric() || ".-_}~".contains(c))
            })
        })
    });
    assert_none("no path of one machine", findings);
}

#[test]
fn every_module_opens_with_its_purpose() {
    let sources = all();
    let findings = sources
        .iter()
        .filter(|source| source.is_rust() && !source.text.starts_with("//! "))
        .map(|source| source.path.clone());
    assert_none("a module opens with its purpose", findings.collect());
}

#[test]
fn the_name_of_a_control_file_is_written_once() {
    let sources = all();
    let mut findings = Vec::new();
    // What has no dot is an ordinary word too.
    for row in ROWS.iter().filter(|row| row.name.contains('.')) {
        let literal = format!("\"{}\"", row.name);
        for source in sources.iter().filter(|source| source.is_rust()) {
            let elsewhere = !source.is_test() && source.path != "daemon/model/src/row.rs";
            if elsewhere && source.product().contains(&literal) {
                findings.push(format!("{} in {}", row.name, source.path));
            }
        }
    }
    assert_none("a control file's name is written once: its row", findings);
}

#[test]
fn what_is_pure_does_no_io_and_reads_no_clock() {
    const IMPURE: [&str; 10] = [
        "fs",
        "net",
        "process",
        "thread",
        "Instant",
        "SystemTime",
        "async",
        "tokio",
        "rustix",
        "Mutex",
    ];
    let sources = all();
    let mut findings = Vec::new();
    for source in sources.iter().filter(|source| source.is_rust()) {
        if source.is_in(&["daemon/model/src", "daemon/policy/src"]) {
            let code = code(source.product());
            let paths = IMPURE.iter().filter(|word| {
                let path = format!("std::{word}");
                code.contains(&path)
                    || (word.len() > 3 && has_word(&code, word) && **word != "process")
            });
            findings.extend(paths.map(|word| format!("{word} in {}", source.path)));
        }
    }
    assert_none("model and policy are pure", findings);
}

/// A package's manifest.
fn manifests() -> BTreeMap<String, (String, toml::Table)> {
    let mut found = BTreeMap::new();
    for source in all() {
        if source.path.ends_with("/Cargo.toml") {
            let table: toml::Table = source.text.parse().expect(&source.path);
            let name = table["package"]["name"]
                .as_str()
                .expect("a package has a name");
            found.insert(name.to_owned(), (source.path, table));
        }
    }
    found
}

fn dependencies(manifest: &toml::Table) -> Vec<String> {
    ["dependencies", "dev-dependencies", "build-dependencies"]
        .iter()
        .filter_map(|section| manifest.get(*section)?.as_table())
        .flat_map(|section| section.keys().cloned())
        .collect()
}

#[test]
fn dependencies_point_one_way() {
    const MODEL: &str = "gcgroup-model";
    const DEVICE: &str = "gcgroup-device";
    const KERNELS: &str = "gcgroup-kernels";
    const SIM: &str = "gcgroup-device-sim";
    const NVIDIA: &str = "gcgroup-device-nvidia";
    const CUDA: &str = "gcgroup-cuda";
    let may_use: BTreeMap<&str, Vec<&str>> = BTreeMap::from([
        (MODEL, vec![]),
        ("gcgroup-policy", vec![MODEL]),
        (DEVICE, vec![MODEL]),
        ("gcgroup-fs", vec![MODEL]),
        (KERNELS, vec![MODEL]),
        ("gcgroup", vec![MODEL]),
        (NVIDIA, vec![MODEL, DEVICE]),
        (SIM, vec![MODEL, DEVICE, KERNELS]),
        (CUDA, vec![MODEL, KERNELS]),
        (
            "gcgroupd",
            vec![
                MODEL,
                DEVICE,
                KERNELS,
                SIM,
                NVIDIA,
                CUDA,
                "gcgroup-policy",
                "gcgroup-fs",
            ],
        ),
        (
            "gcgroup-lab",
            vec![MODEL, DEVICE, KERNELS, SIM, NVIDIA, CUDA],
        ),
        ("gcgroup-integration-tests", vec![MODEL, KERNELS, SIM]),
    ]);
    let mut findings = Vec::new();
    for (name, (path, manifest)) in manifests() {
        let Some(allowed) = may_use.get(name.as_str()) else {
            findings.push(format!("{path}: {name} has no place in the house"));
            continue;
        };
        for used in dependencies(&manifest) {
            if used.starts_with("gcgroup") && !allowed.contains(&used.as_str()) {
                findings.push(format!("{path}: {name} may not use {used}"));
            }
            let only = match used.as_str() {
                "fuser" => "gcgroup-fs",
                "cudarc" => CUDA,
                "nvml-wrapper" => NVIDIA,
                _ => continue,
            };
            if name != only {
                findings.push(format!("{path}: {used} is for {only} alone"));
            }
        }
    }
    assert_none("dependencies point one way", findings);
}

#[test]
fn every_package_takes_the_lints_and_the_licence_of_the_workspace() {
    let root = fs::read_to_string(workspace().join("Cargo.toml")).expect("it is there");
    let root: toml::Table = root.parse().expect("it is TOML");
    let mut findings = Vec::new();
    for (name, (path, manifest)) in manifests() {
        let inherits =
            |table: &toml::Value| table.get("workspace") == Some(&toml::Value::Boolean(true));
        if !manifest["package"].get("license").is_some_and(inherits) {
            findings.push(format!("{path}: the licence is that of the workspace"));
        }
        match manifest.get("lints") {
            Some(lints) if inherits(lints) => {}
            // These call libraries of C, so one lint differs.
            Some(lints) if ["gcgroup-device-nvidia", "gcgroup-cuda"].contains(&name.as_str()) => {
                let mut expected = root["workspace"]["lints"].clone();
                for table in [&mut expected, &mut lints.clone()] {
                    drop(
                        table["rust"]
                            .as_table_mut()
                            .and_then(|rust| rust.remove("unsafe_code")),
                    );
                }
                let mut own = lints.clone();
                drop(
                    own["rust"]
                        .as_table_mut()
                        .and_then(|rust| rust.remove("unsafe_code")),
                );
                if own != expected {
                    findings.push(format!(
                        "{path}: its lints are those of the workspace but one"
                    ));
                }
            }
            _ => findings.push(format!("{path}: the lints are those of the workspace")),
        }
    }
    assert_none("lints and licence stand in the workspace", findings);
}

#[test]
fn every_kernel_is_one_file_with_its_ptx() {
    let sources = all();
    let stems = |directory: &str, extension: &str| -> Vec<String> {
        let files = sources
            .iter()
            .filter(|source| source.extension() == extension);
        let names = files.filter_map(|source| source.path.strip_prefix(directory));
        let mut stems: Vec<_> = names
            .filter_map(|name| name.strip_suffix(&format!(".{extension}")))
            .map(str::to_owned)
            .collect();
        stems.sort();
        stems
    };
    let mut rows: Vec<_> = gcgroup_kernels::catalogue::KERNELS
        .iter()
        .map(|kernel| kernel.name.to_owned())
        .chain(HELPERS.map(str::to_owned))
        .collect();
    rows.sort();
    assert_eq!(
        stems("kernels/cuda/", "cu"),
        rows,
        "one .cu for each row of the catalogue"
    );
    assert_eq!(
        stems("kernels/cuda/ptx/", "ptx"),
        rows,
        "one .ptx for each row of the catalogue"
    );
}
