//! What is mapped before tokens need it.
