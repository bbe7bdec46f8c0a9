//! t
mod num;
mod server;
mod size;
mod trace;
fn main() {}
