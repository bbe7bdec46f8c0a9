//! What the benches that run on real drivers share: which devices there are ([`devices`]), and a
//! driver's calls without this library around them ([`bare`]).

#![allow(dead_code, unreachable_pub, reason = "every bench uses a part of it")]

pub mod bare;
pub mod devices;
