//! Prints docs/control-files.md.

mod render;

fn main() {
    print!("{}", render::manual());
}
