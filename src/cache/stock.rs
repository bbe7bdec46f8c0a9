//! Which extents are kept at hand.
