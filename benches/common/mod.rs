//! What the benches that run on real drivers share: which devices there are ([`devices`]), a
//! driver's calls without this library around them ([`bare`]), and when a card is left alone ([`pause`]).

#![allow(dead_code, unreachable_pub, reason = "every bench uses a part of it")]

pub mod bare;
pub mod devices;
pub mod pause;
