//! What the benches that run on real drivers share: which devices there are ([`devices`]), a
//! driver's calls without this library around them ([`bare`]), when a card is left alone ([`pause`]),
//! kernels that a server waits for ([`work`]), and what the baselines are told ([`baseline`]).

#![allow(dead_code, unreachable_pub, reason = "every bench uses a part of it")]

pub mod bare;
pub mod baseline;
pub mod devices;
pub mod pause;
pub mod work;
