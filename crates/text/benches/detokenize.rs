//! Cost of a generated token on its way out.
fn main() {}
