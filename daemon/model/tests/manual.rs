//! The checked-in manual is the one that the rows make.

#[path = "../examples/manual/render.rs"]
mod render;

use std::path::Path;

#[test]
fn the_manual_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/control-files.md");
    let checked_in = std::fs::read_to_string(&path).expect("docs/control-files.md exists");
    assert!(
        checked_in == render::manual(),
        "docs/control-files.md is not what the rows make; regenerate it with\n\
         cargo run -q -p gcgroup-model --example manual > docs/control-files.md"
    );
}

#[test]
fn the_manual_has_every_file_and_every_field() {
    let manual = render::manual();
    for row in gcgroup_model::ROWS {
        assert!(
            manual.contains(&format!("- `{}`: {}", row.name, row.manual)),
            "{} is missing",
            row.name
        );
    }
    for field in gcgroup_model::spec::FIELDS {
        assert!(
            manual.contains(&format!("| `{}` |", field.name)),
            "{} is missing",
            field.name
        );
    }
}
